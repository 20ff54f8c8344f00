"""Tensors in a file that processes share: written chunk by chunk, read through a memory mapping."""

import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Sequence
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
    size = tuple(shape)
    return torch.empty(size, dtype=dtype)


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
        whole_shape = torch.Size(shape)
        size = whole_shape.numel() * dtype.itemsize
        if not size:
            return in_process(shape, dtype)
        begins = self.end
        self._take_from_disk(begins, size)
        descriptor = self.file.fileno()
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, offset=begins)
        row = torch.frombuffer(mapped, dtype=dtype)
        tensor = row.view(whole_shape)
        address = tensor.data_ptr()
        self.given[address] = (begins, tensor)
        blocks = math.ceil(size / _HEADER)
        taken = blocks * _HEADER
        self.end = begins + taken
        return tensor

    def _take_from_disk(self, begins: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            descriptor = self.file.fileno()
            os.posix_fallocate(descriptor, begins, size)
            return
        end = begins + size
        self.file.truncate(end)

    def finish(self, tensors: dict[str, Tensor], extra: Plain) -> None:
        """Makes the file hold these tensors, and `extra` (plain data), and be on the disk."""
        placed = {}
        for name, tensor in tensors.items():
            on_cpu = tensor.detach().cpu()
            placed[name] = self._place(on_cpu)
        size = self.end
        os.truncate(self.path, size)
        line = _header_line({"size": size, "tensors": placed, "extra": extra})
        length = len(line)
        if length > _HEADER:
            raise OSError(f"the header of {self.path} takes {length} bytes")
        self.file.write(line)
        self.file.flush()
        # A machine that stops must not leave a complete name with an incomplete content.
        descriptor = self.file.fileno()
        os.fsync(descriptor)

    def _place(self, tensor: Tensor) -> Plain:
        """Where a tensor is in the file, to which it is copied if it is not there yet."""
        tensor = tensor.contiguous()
        offset = 0
        if tensor.nbytes:
            if tensor.data_ptr() not in self.given:
                tensor = self._copied(tensor)
            address = tensor.data_ptr()
            offset, _ = self.given[address]
        dtype = str(tensor.dtype)
        return {
            "offset": offset,
            "shape": list(tensor.shape),
            "dtype": dtype.removeprefix("torch."),
            "check": _check(tensor),
        }

    def _copied(self, tensor: Tensor) -> Tensor:
        room = self.allocate(tensor.shape, tensor.dtype)
        targets = _pieces(room)
        sources = _pieces(tensor)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return room

    def close(self) -> None:
        """Lets go of the file; its tensors stay readable as long as they are used."""
        self.file.close()


def _header_line(header: Plain) -> bytes:
    """A header as one line that begins with its checksum: see `_read_header`."""
    text = json.dumps(header).encode()
    check = zlib.crc32(text)
    return b"%08x %s\n" % (check, text)


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
        found = os.fstat(descriptor)
        if found.st_size != size:
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


def _mapped_tensor(mapped: mmap.mmap, placed: Plain) -> Tensor:
    name = placed["dtype"]
    dtype = getattr(torch, name)
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
    row = tensor.reshape(-1)
    bytes_of_row = row.view(torch.uint8)
    array = bytes_of_row.numpy()
    data = memoryview(array.data)
    size = len(data)
    if size <= _SAMPLES * _SAMPLE:
        return zlib.crc32(data)
    value = 0
    last_start = size - _SAMPLE
    for number in range(_SAMPLES):
        start = last_start * number // (_SAMPLES - 1)
        end = start + _SAMPLE
        sample = data[start:end]
        value = zlib.crc32(sample, value)
    return value


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor in pieces along its first dimension, of some MiB each."""
    if tensor.dim():
        return pieces(tensor)
    return (tensor,)


def pieces(tensor: Tensor, size: int = 2**24) -> Sequence[Tensor]:
    """Views of a tensor (N, …) along its first dimension, of about `size` bytes each."""
    rows = max(len(tensor), 1)
    bytes_of_row = tensor.nbytes // rows
    rows_in_size = size // max(bytes_of_row, 1)
    at_once = max(rows_in_size, 1)
    views = tensor.split(at_once)
    return tuple(views)
