"""Tensors in a file that processes share: written chunk by chunk, read through a memory mapping."""

import json
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Allocator = Callable[[Sequence[int], torch.dtype], Tensor]
"""Allocates a tensor of this shape and type, in memory or in a file."""

Plain = dict[str, Any]
"""What JSON has."""

_HEADER = 64 * 1024  # a multiple of every page size
# So that a private mapping may be larger than memory; not in Python 3.11.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_SAMPLES, _SAMPLE = 16, 64 * 1024


def in_process(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room in this process."""
    return torch.empty(tuple(shape), dtype=dtype)


class TensorFile:
    """A new file of tensors. It can be read once `finish` has written its header; until then it is
    not complete.

    Raises:
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("w+b")
        self.given: dict[int, tuple[int, Tensor]] = {}
        """Offset and room by address; kept, so that no other tensor gets the address."""
        self.end = _HEADER

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room in the file, all of it taken from the disk now: a disk that is full later could only
        end the process."""
        wanted = torch.empty(tuple(shape), dtype=dtype, device="meta")
        size = wanted.nbytes
        if not size:
            return in_process(shape, dtype)
        begins = self.end
        descriptor = self.file.fileno()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, begins, size)
        else:
            self.file.truncate(begins + size)
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, offset=begins)
        row = torch.frombuffer(mapped, dtype=dtype)
        tensor = row.view(wanted.shape)
        self.given[tensor.data_ptr()] = (begins, tensor)
        pages = -(-size // _HEADER)
        self.end = begins + pages * _HEADER
        return tensor

    def finish(self, tensors: dict[str, Tensor], extra: Plain) -> None:
        """Makes the file hold these tensors, and `extra` (plain data), and be on the disk."""
        placed = {}
        for name, tensor in tensors.items():
            placed[name] = self._place(tensor.detach().cpu())
        os.truncate(self.path, self.end)
        header = {"size": self.end, "tensors": placed, "extra": extra}
        text = json.dumps(header).encode()
        check = zlib.crc32(text)
        line = b"%08x %s\n" % (check, text)
        if len(line) > _HEADER:
            raise OSError(f"the header of {self.path} takes {len(line)} bytes")
        self.file.write(line)
        self.file.flush()
        # A machine that stops must not leave a complete name with an incomplete content.
        os.fsync(self.file.fileno())

    def _place(self, tensor: Tensor) -> Plain:
        """Where a tensor is in the file, to which it is copied if it is not there yet."""
        tensor = tensor.contiguous()
        offset = 0
        if tensor.nbytes:
            if tensor.data_ptr() not in self.given:
                tensor = self._copied(tensor)
            offset, _ = self.given[tensor.data_ptr()]
        dtype = str(tensor.dtype).removeprefix("torch.")
        check = _check(tensor)
        return {"offset": offset, "shape": list(tensor.shape), "dtype": dtype, "check": check}

    def _copied(self, tensor: Tensor) -> Tensor:
        room = self.allocate(tensor.shape, tensor.dtype)
        for part, source in zip(_pieces(room), _pieces(tensor), strict=True):
            part.copy_(source)
        return room

    def close(self) -> None:
        """Lets go of the file; its tensors stay readable as long as they are used."""
        self.file.close()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Plain] | None:
    """The tensors and the plain data of a file, or None if it is damaged.

    The mapping is private: processes share the pages that they only read, and what one writes no
    other sees. The check takes the sizes and 1 MiB of samples of each tensor, since checking all
    would read all.

    Raises:
        OSError: if it is not there, or cannot be read or mapped.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        if header is None:
            return None
        size = header["size"]
        descriptor = file.fileno()
        if os.fstat(descriptor).st_size != size:
            return None
        flags = mmap.MAP_PRIVATE | _NORESERVE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(descriptor, size, flags=flags, prot=access)
    tensors = {}
    for name, placed in header["tensors"].items():
        tensor = _mapped_tensor(mapped, placed)
        if _check(tensor) != placed["check"]:
            return None
        tensors[name] = tensor
    return tensors, header["extra"]


def _read_header(file: BinaryIO) -> Plain | None:
    """None if it is damaged."""
    begin = file.read(_HEADER)
    line, _, _ = begin.partition(b"\n")
    check, _, text = line.partition(b" ")
    try:
        wanted = int(check, 16)
    except ValueError:
        return None
    if wanted != zlib.crc32(text):
        return None
    header: Plain = json.loads(text)
    return header


def _mapped_tensor(mapped: mmap.mmap, placed: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, placed["dtype"])
    shape = torch.Size(placed["shape"])
    count = shape.numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    offset = placed["offset"]
    row = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
    return row.view(shape)


def _check(tensor: Tensor) -> int:
    """A checksum of 16 samples of 64 KiB, evenly apart from the first byte to the last; of all,
    where that is all."""
    if not tensor.numel():
        return 0
    row = tensor.reshape(-1).view(torch.uint8)
    data = memoryview(row.numpy().data)
    if len(data) <= _SAMPLES * _SAMPLE:
        return zlib.crc32(data)
    value = 0
    last = len(data) - _SAMPLE
    for number in range(_SAMPLES):
        start = last * number // (_SAMPLES - 1)
        end = start + _SAMPLE
        value = zlib.crc32(data[start:end], value)
    return value


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor in pieces along its first dimension, of some MiB each."""
    if tensor.dim():
        return pieces(tensor)
    return (tensor,)


def pieces(tensor: Tensor, size: int = 2**24) -> Sequence[Tensor]:
    """Views of a tensor (N, …) along its first dimension, of about `size` bytes each."""
    rows = max(len(tensor), 1)
    bytes_of_row = max(tensor.nbytes // rows, 1)
    at_once = max(size // bytes_of_row, 1)
    return tuple(tensor.split(at_once))
