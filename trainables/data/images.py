"""Decodes images into uint8 tensors, chunk by chunk: only the room for the result grows with their number."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainables.data.ahead import Progress, ahead
from trainables.data.room import Empty
from trainables.errors import UserError

_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")

CHUNK = 64
"""Images that a thread decodes at a time."""

Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Rows:
    """Encoded images, and where they go: row `parts[p][k]` becomes image k of part p."""

    chunks: Callable[[], Iterable[list[Any]]]
    """Gives the encoded images in lists, in order; asked again if they have to be read twice."""
    where: str
    """The rows, for messages."""
    parts: Sequence[Tensor]
    """Row numbers (n,) int64; each row is in one of them."""


class _Coloured(Exception):
    """A coloured image came where all before were grey."""


def decode_into(sources: Sequence[Rows], decode: Callable[[Any], Image.Image], size: int | None, empty: Empty) -> list[Tensor]:
    """Decodes all images of all sources, a few chunks at a time in as many threads as there are cores.

    Args:
        sources: what to decode.
        decode: makes an image of an encoded one.
        size: width and height to resize to, bilinear; None leaves the images as they are.
        empty: gives the room for the result.

    Returns:
        For each part of each source (n, C, H, W) uint8. C is 1 where all are grey, else 3: palettes and transparency become RGB.

    Raises:
        UserError: if an image is missing, cannot be decoded, has more than 8 bits per channel, or another size than the rest.
    """
    try:
        return _decode_into(sources, decode, size, empty, None)
    except _Coloured:  # rare: the first coloured image is not among the first few
        return _decode_into(sources, decode, size, empty, 3)


def _decode_into(
    sources: Sequence[Rows], decode: Callable[[Any], Image.Image], size: int | None, empty: Empty, channels: int | None
) -> list[Tensor]:
    made: list[list[Tensor]] = []
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    progress = Progress(f"decoding {sources[0].where}", sum(len(part) for rows in sources for part in rows.parts))
    for number, rows in enumerate(sources):
        count = sum(len(part) for part in rows.parts)
        part_of, place = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        for index, part in enumerate(rows.parts):
            part_of[part], place[part] = index, torch.arange(len(part))
        first = 0

        def decoded(item: tuple[int, list[Any]], where: str = rows.where) -> list[Array]:
            return _decode(item[1], decode, size, where, item[0])

        numbered = ((CHUNK * index, chunk) for index, chunk in enumerate(rows.chunks()))
        with closing(ahead(decoded, numbered, depth=threads + 2, workers=threads)) as chunks:
            for images in chunks:
                coloured = any(image.shape[2] == 3 for image in images)
                if not made:
                    channels = channels or (3 if coloured else 1)
                    height, width = images[0].shape[:2]
                    shape = (channels, height, width)
                    made = [[empty((len(part), *shape), torch.uint8) for part in other.parts] for other in sources]
                if coloured and channels == 1:
                    raise _Coloured
                _check_sizes(images, (height, width))
                stacked = _stack(images, shape)
                here = slice(first, first + len(images))
                for index, out in enumerate(made[number]):
                    mine = part_of[here] == index
                    out[place[here][mine]] = stacked[mine]
                first += len(images)
                progress.advance(len(images))
    return [out for outs in made for out in outs]


def _decode(encoded: list[Any], decode: Callable[[Any], Image.Image], size: int | None, where: str, first: int) -> list[Array]:
    """Arrays (H, W, 1) for grey images and (H, W, 3) for all others; `first` is the row number of the first, for messages."""
    images = []
    for row, item in enumerate(encoded, first):
        try:
            image = decode(item)
            image.load()
        except Exception as error:  # Pillow raises many kinds on broken files
            raise UserError(f"row {row} of {where} is not an image that Pillow can read: {error}") from error
        if image.mode in _DEEP:
            raise UserError(f"row {row} of {where} has more than 8 bits per channel; convert the images to 8 bits")
        image = image.convert("L" if image.mode in _GREY else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        images.append(pixels[:, :, None] if pixels.ndim == 2 else pixels)
    return images


def _stack(images: list[Array], shape: tuple[int, int, int]) -> Tensor:
    """Arrays (H, W, 1 or 3) as one tensor (N, *shape) uint8, with shape (C, H, W); grey becomes RGB where C is 3."""
    out = np.empty((len(images), *shape), dtype=np.uint8)
    for row, image in enumerate(images):
        out[row] = image.transpose(2, 0, 1)
    return torch.from_numpy(out)


def _check_sizes(images: list[Array], size: tuple[int, int]) -> None:
    """Raises UserError if an image (H, W, …) is not of this height and width."""
    for image in images:
        if image.shape[:2] != size:
            few = " and ".join(f"{width}×{height}" for height, width in sorted([size, image.shape[:2]]))
            raise UserError(
                f"the images have different sizes ({few}, say), and a network needs one; "
                "add 'size: 32' to the data to resize all to 32×32 pixels"
            )
