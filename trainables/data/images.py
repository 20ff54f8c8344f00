"""Decodes images, once, into uint8 tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainables.errors import UserError

_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")

Array = np.ndarray[Any, np.dtype[np.uint8]]


def decode_all(encoded: Iterable[Any], decode: Callable[[Any], Image.Image], size: int | None, where: str) -> list[Array]:
    """Decodes images one after the other. Threads were slower here on small images, whose cost is Python's.

    Args:
        encoded: what `decode` makes an image of.
        size: width and height to resize to, bilinear; None leaves the images as they are.
        where: the rows, for messages.

    Returns:
        Arrays (H, W, 1) for grey images and (H, W, 3) for all others (palettes and transparency become RGB).

    Raises:
        UserError: if an image is missing, cannot be decoded, or has more than 8 bits per channel.
    """
    images = []
    for row, item in enumerate(encoded):
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


def stack(images: list[Array], channels: int) -> Tensor:
    """Arrays (H, W, 1 or 3) of one size as one tensor (N, channels, H, W) uint8; grey becomes RGB where 3 are asked for."""
    height, width, _ = images[0].shape
    out = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for row, image in enumerate(images):
        out[row] = image.transpose(2, 0, 1)
    return torch.from_numpy(out)


def check_sizes(images: list[Array]) -> None:
    """Raises UserError if the images (H, W, …) are not all of one size."""
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        few = " and ".join(f"{width}×{height}" for height, width in sorted(sizes)[:2])
        raise UserError(
            f"the images have {len(sizes)} different sizes ({few}, say), and a network needs one; "
            "add 'size: 32' to the data to resize all to 32×32 pixels"
        )
