"""Decodes images into uint8 tensors, chunk by chunk: only the room for the result grows with their
number."""

import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from slimfront.trainables.data.ahead import Progress, ahead
from slimfront.trainables.data.tensor_file import Allocator
from slimfront.trainables.errors import UserError, first_line

_GREY = ("1", "L", "LA", "La")
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")

log = logging.getLogger(__name__)

CHUNK = 64
"""Images that are decoded at a time."""

LONG = 20.0
"""Seconds of decoding that are worth starting processes for: each takes some to start."""

Array = np.ndarray[Any, np.dtype[np.uint8]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """Encoded images, and where they go: row `parts[p][k]` becomes image k of part p."""

    chunks: Callable[[], Iterable[list[Any]]]
    """Gives the encoded images in lists, in order; asked again if they have to be read twice."""
    where: str
    """The rows, for messages."""
    parts: Sequence[Tensor]
    """Row numbers (n,) int64; each row is in one of them."""

    def count(self) -> int:
        """How many there are."""
        return sum(len(part) for part in self.parts)


class _Coloured(Exception):
    """A coloured image came where all before were grey."""


def decode_into(
    sources: Sequence[Rows],
    decode: Callable[[Any], Image.Image],
    size: int | None,
    allocate: Allocator,
) -> list[Tensor]:
    """Decodes all images of all sources, a few chunks at a time, in processes if it takes long.

    Args:
        sources: what to decode.
        decode: makes an image of an encoded one.
        size: width and height to resize to, bilinear; None leaves the images as they are.
        allocate: allocates the result.

    Returns:
        For each part of each source (n, C, H, W) uint8. C is 1 where all are grey, else 3: palettes
        and transparency become RGB.

    Raises:
        UserError: if an image is missing, cannot be decoded, has more than 8 bits per channel, or
            another size than the rest.
    """
    _warn_of_transparency.cache_clear()
    try:
        return _decode_into(sources, decode, size, allocate, None)
    except _Coloured:  # rare: the first coloured image is not among the first few
        return _decode_into(sources, decode, size, allocate, 3)


def _decode_into(
    sources: Sequence[Rows],
    decode: Callable[[Any], Image.Image],
    size: int | None,
    allocate: Allocator,
    channels: int | None,
) -> list[Tensor]:
    made: list[list[Tensor]] = []
    count = sum(rows.count() for rows in sources)
    where = sources[0].where
    progress = Progress(f"decoding {where}", count)
    for number, rows in enumerate(sources):
        part_of, place = _destinations(rows)
        first = 0
        make = partial(_decode, decode=decode, size=size, where=rows.where)
        with closing(_decoded(make, rows)) as chunks:
            for images in chunks:
                coloured = any(image.shape[2] == 3 for image in images)
                if channels is None:
                    channels = 3 if coloured else 1
                if not made:
                    height, width, _ = images[0].shape
                    made = _room(sources, (channels, height, width), allocate)
                if coloured and channels == 1:
                    raise _Coloured
                _check_sizes(images, (height, width))
                # Not written by torch, which would start threads for each image.
                outs = [out.numpy() for out in made[number]]
                for row, image in enumerate(images, first):
                    out = outs[part_of[row]]
                    channels_first = image.transpose(2, 0, 1)
                    # Grey becomes RGB where there are 3 channels.
                    out[place[row]] = channels_first
                taken = len(images)
                first += taken
                progress.advance(taken)
    return list(chain.from_iterable(made))


def _destinations(rows: Rows) -> tuple[Indices, Indices]:
    """For each row the number of its part, and its place there."""
    count = rows.count()
    part_of = np.empty(count, dtype=np.int64)
    place = np.empty(count, dtype=np.int64)
    for number, part in enumerate(rows.parts):
        indices = part.numpy()
        places = np.arange(len(indices))
        part_of[indices] = number
        place[indices] = places
    return part_of, place


def _room(
    sources: Sequence[Rows], shape: tuple[int, int, int], allocate: Allocator
) -> list[list[Tensor]]:
    """A tensor for each part of each source."""
    room = []
    for rows in sources:
        of_source = []
        for part in rows.parts:
            tensor = allocate((len(part), *shape), torch.uint8)
            of_source.append(tensor)
        room.append(of_source)
    return room


def _decoded(
    make: Callable[[tuple[int, list[Any]]], list[Array]], rows: Rows
) -> Generator[list[Array]]:
    """The decoded chunks in order, made in this thread; in processes, once it is seen that it would
    take long.

    Not in threads: they take turns for all that Python does, which is most of the work on small
    images.
    """
    numbered = ((CHUNK * index, chunk) for index, chunk in enumerate(rows.chunks()))
    cores = usable_cores()
    started = time.monotonic()
    done = 0
    for item in numbered:
        yield make(item)
        _, chunk = item
        done += len(chunk)
        spent = time.monotonic() - started
        left = spent / done * (rows.count() - done)
        # Not at once: the very first images take longer.
        too_early = spent <= LONG / 20
        if too_early or left <= LONG or cores == 1:
            continue
        start = partial(ProcessPoolExecutor, cores, timeout=60)
        try:
            # The caller's thread keeps reading and writing.
            yield from ahead(make, numbered, 2 * cores, start)
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that decoded {rows.where} died; was there too little memory?"
            ) from error
        return


@functools.cache
def _warn_of_transparency(where: str) -> None:
    """Says so once in a process."""
    log.warning(
        "%s have transparent images, whose alpha is left out, so that what it hid is seen; lay "
        "them on a background before",
        where,
    )


def _is_transparent(image: Image.Image) -> bool:
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return False
    pixels = np.asarray(image.convert("RGBA"))
    alpha = pixels[:, :, 3]
    return int(alpha.min()) < 255


def usable_cores() -> int:
    """Those that this process may use, eight at most: each process takes some 200 MB."""
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    return min(8, usable)


def _decode(
    item: tuple[int, list[Any]], decode: Callable[[Any], Image.Image], size: int | None, where: str
) -> list[Array]:
    """Arrays (H, W, 1) for grey images and (H, W, 3) for all others; `item` is the first row's
    number and the encoded images."""
    first, encoded = item
    images = []
    for row, item in enumerate(encoded, first):
        try:
            image = decode(item)
            image.load()
        except Exception as error:  # Pillow raises many kinds on broken files
            reason = first_line(error)
            if isinstance(error, UnidentifiedImageError):
                reason = "it is of no known kind, or broken"
            raise UserError(
                f"{_named(row, item, where)} is not an image that Pillow can read: {reason}"
            ) from error
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise UserError(
                f"{_named(row, item, where)} has {frames} frames or pages; keep one of each file"
            )
        if image.mode in _DEEP:
            raise UserError(
                f"{_named(row, item, where)} has more than 8 bits per channel; convert the images "
                "to 8 bits"
            )
        if _is_transparent(image):
            _warn_of_transparency(where)
        image = image.convert("L" if image.mode in _GREY else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        images.append(pixels)
    return images


def _named(row: int, encoded: Any, where: str) -> str:
    """An image in words, with its file where it has one."""
    named = f"row {row} of {where}"
    path = None
    if isinstance(encoded, Mapping):
        path = encoded.get("path")
    if path:
        named += f", the file {path},"
    return named


def _check_sizes(images: list[Array], size: tuple[int, int]) -> None:
    """Raises UserError if an image (H, W, …) is not of this height and width."""
    for image in images:
        if image.shape[:2] != size:
            two = sorted([size, image.shape[:2]])
            few = " and ".join(f"{width}×{height}" for height, width in two)
            raise UserError(
                f"the images have different sizes ({few}, say), and a network needs one; "
                "add 'size: 32' to the data to resize all to 32×32 pixels"
            )
