"""What a search gets for its epochs on a convolutional network: a small ResNet on MNIST, ours and
what a user would assemble."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import KEEP, Kept, Outcome, run
from benchmarks.pretrained import read_images
from benchmarks.search_quality import OURS, VARIANTS, compared, goals_of, rows_of

TRAIN, VALIDATION, TEST = 2_400, 1_600, 2_000
POOL = 2
"""Images of 28 × 28 pixels are pooled to 14 × 14."""
TRIALS, EPOCHS = 24, 15
WITHOUT_ONE_SHOT = "ours without one-shot pruning"


def config(folder: Path, epochs: int) -> dict[str, Any]:
    """The main job's space, with channels in the place of layers, for a ResNet."""
    return {
        "name": "images",
        "data": {"factory": "benchmarks.search_images:images", "args": {"folder": str(folder)}},
        "model": {"factory": "benchmarks.workloads:resnet"},
        "training": {
            **{"epochs": epochs, "batch_size": 64, "optimizer": "adam", "lr": 3e-3},
            "schedule": "cosine",
        },
        "penalties": {
            "channel": {"strength": 1.0},
            "cka": {"strength": 1e-3, "samples": 8, "every": 5},
        },
        "sparsifier": {"name": "magnitude", "sparsity": 0.9},
        "space": {
            "penalties.channel.strength": {"low": 0.1, "high": 10, "log": True},
            "penalties.cka.strength": {"low": 1e-5, "high": 1e-2, "log": True},
            "sparsifier.sparsity": {"low": 0.5, "high": 0.99},
        },
        "objectives": ["val_accuracy", "nonzero_params"],
        "resources": {"cpu": 1, "gpu": 0},
    }


def images(folder: str) -> dict[str, Any]:
    """The splits that `write_images` wrote."""
    splits: dict[str, Any] = torch.load(Path(folder, "images.pt"), weights_only=True)
    return splits


def write_images(mnist: Path, folder: Path) -> None:
    """The first images of each file of MNIST, pooled, as splits."""
    inputs, labels = read_images(mnist / "train.parquet", TRAIN + VALIDATION, POOL)
    splits = {
        "train": (inputs[:TRAIN], labels[:TRAIN]),
        "validation": (inputs[TRAIN:], labels[TRAIN:]),
        "test": read_images(mnist / "test.parquet", TEST, POOL),
    }
    torch.save(splits, folder / "images.pt")


def search_images(arguments: argparse.Namespace) -> Outcome:
    """The smallest network within one and two points of dense over epochs spent, of a ResNet on
    MNIST, as a share of the dense network's non-zero weights (median and range)."""
    seeds, trials, epochs = arguments.seeds, TRIALS, EPOCHS
    names = [OURS, WITHOUT_ONE_SHOT]
    assert set(names) <= set(VARIANTS)
    if arguments.quick:
        seeds, trials, epochs = 1, 2, 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(Path(arguments.mnist), folder)
        job = folder / "images.yaml"
        job.write_text(json.dumps(config(folder, epochs)))
        found = compared(job, seeds, names, trials, Kept(arguments.keep))
    budget = trials * epochs
    return Outcome(seeds, rows_of(found, budget), goals_of(found, budget))


if __name__ == "__main__":
    run(
        "search_images",
        search_images,
        ("--seeds", {"type": int, "default": 5}),
        ("--mnist", {"required": True, "help": "the folder of MNIST's parquet files"}),
        KEEP,
    )
