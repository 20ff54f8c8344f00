"""Data that tests make: images in memory, as parquet files with encoded PNGs, and as folders of
PNGs."""

import io
import os
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from slimfront.trainables.data import Dataset, Split


def pictures(
    count: int, channels: int, size: int = 8, classes: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random images (N, H, W) or (N, H, W, 3) uint8, a class brighter than the one before, and
    labels 0, 1, 2, 0, 1, …"""
    labels = np.arange(count) % classes
    shape = (count, size, size) if channels == 1 else (count, size, size, 3)
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    return (noise + 60 * labels.reshape(-1, *[1] * (len(shape) - 1))).astype(np.uint8), labels


def image_tensors(
    count: int = 120, channels: int = 3, dtype: str = "uint8"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A factory of `pictures`, as tensors (N, C, H, W) and (N,)."""
    images, labels = pictures(count, channels)
    tensor = torch.from_numpy(images)
    tensor = tensor.unsqueeze(1) if channels == 1 else tensor.permute(0, 3, 1, 2).contiguous()
    return tensor.to(getattr(torch, dtype)), torch.from_numpy(labels)


def image_arrays(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A factory that returns NumPy arrays, of float64 rows."""
    images, labels = pictures(count, 1)
    return images.reshape(count, -1).astype(np.float64), labels


def ready_dataset(dtype: str = "uint8", largest_label: int = 2) -> Dataset:
    """A factory that splits by itself."""
    inputs, labels = image_tensors(30, dtype=dtype)
    labels[0] = largest_label
    parts = [Split(inputs[i::3], labels[i::3] if i else labels[::3]) for i in range(3)]
    return Dataset(*parts, outputs=3)


def counted(
    log: str, count: int = 120, wait_for: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`image_tensors`, after the process wrote its number to the file `log`, and after the files
    `wait_for` are there."""
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not all(Path(name).exists() for name in wait_for or []):
        time.sleep(0.01)
    return image_tensors(count)


def a_list() -> list[int]:
    return [1, 2]


def four_tensors() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))


def labels_with_a_gap() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 2), torch.tensor([-1, 2, 1])


def unequal_lengths() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 2), torch.tensor([0, 1])


def targets_by_name() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.zeros(3, 2), {"box": torch.zeros(3, 4), "kind": torch.zeros(3)}


def broken() -> None:
    raise OSError("the disk is on fire")


not_a_function = 3


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """An image (H, W) or (H, W, 3) as the bytes of a PNG file, optionally converted to another mode
    of Pillow's first."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path,
    encoded: list[bytes],
    labels: np.ndarray,
    *,
    image: str = "image",
    label: str = "label",
) -> None:
    """A parquet file with an Image and a ClassLabel column, as the hub has them."""
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=["dark", "grey", "bright"])}
    )
    rows = {image: [{"bytes": item, "path": None} for item in encoded], label: labels.tolist()}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))


def write_splits(
    folder: Path, channels: int, train: int = 60, test: int | None = 30, size: int = 8
) -> None:
    """`train.parquet` of `pictures` and, unless None, `test.parquet` of others."""
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        if count is not None:
            images, labels = pictures(count, channels, size, seed=seed)
            write_parquet(folder / f"{name}.parquet", [png(pixels) for pixels in images], labels)


def write_folder(folder: Path, channels: int, count: int = 30) -> None:
    """`train/CLASS/x.png` and `test/CLASS/x.png`."""
    for seed, split in enumerate(("train", "test")):
        images, labels = pictures(count, channels, seed=seed)
        for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / split / ("dark", "grey", "bright")[label] / f"{row:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(pixels))


def masked_ids(count: int = 60) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token ids, and truths that say which of them there are."""
    ids = torch.arange(count * 5).view(count, 5) % 7
    return {"ids": ids.to(torch.int32), "mask": ids > 0}, torch.arange(count) % 2


def ages() -> tuple[torch.Tensor, torch.Tensor]:
    """A table of whole numbers."""
    years = torch.arange(180).view(60, 3)
    return years, torch.arange(60) % 2
