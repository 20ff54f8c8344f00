"""Block sparsity on ResNet-20 and CIFAR-10: how many of the nine residual blocks can go, and what
that costs."""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Outcome, at_least, run, spread
from slimfront import Candidate
from slimfront.trainables.training.loop import Training

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
STRENGTHS = (0.0, 0.03, 0.05, 0.08, 0.1, 0.2)


def train_one(
    strength: float, seed: int, *, epochs: int, limit: int | None, device: str
) -> dict[str, float]:
    """One ResNet-20 under block sparsity, compacted and refitted: blocks removed, layers,
    parameters, accuracies."""
    data: dict[str, Any] = {
        "name": "huggingface",
        "path": str(CIFAR),
        "validation": 0.1,
        "augment": {"crop": 4, "flip": True},
    }
    candidate = Candidate.model_validate(
        {
            "data": data | ({"limit": limit} if limit else {}),
            "model": "resnet20",
            "training": {
                "epochs": epochs,
                "batch_size": 128,
                "optimizer": "sgd",
                "lr": 0.1,
                "weight_decay": 5e-4,
                "schedule": "cosine",
                "seed": seed,
            },
            "penalties": {"block": {"strength": strength}} if strength else {},
            "refit": {
                "epochs": max(1, epochs // 2),
                "lr": 2e-3,
            },  # small: batch norms are folded by then
        }
    )
    training = Training(candidate, device)
    while not training.done:
        training.run_epoch()
    finished = training.finish()
    test = training.data.task.evaluate(
        finished.compacted.network, *training.data.test, "test", prepare=training.data.prepare
    )["test_accuracy"]
    m = finished.measures
    removed = finished.compacted.report.count("block removed")
    return {
        "removed": removed,
        "layers": m["layers"],
        "params": m["params"],
        "validation": m["val_accuracy"],
        "test": test,
    }


def block_sparsity(arguments: argparse.Namespace) -> Outcome:
    """ResNet-20 with block sparsity from none to strong."""
    if not CIFAR.exists():
        raise SystemExit("there is no CIFAR-10 beside the checkout; see docs/layer-sparsity.md")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full = device == "cuda"
    epochs, limit, seeds = (160, None, 3) if full else (6, 6000, 1)
    strengths = STRENGTHS
    if arguments.quick:
        epochs, limit, seeds, strengths = 1, 1000, 1, STRENGTHS[::5]
    rows, most = [], 0.0
    for strength in strengths:
        fits = [
            train_one(strength, seed, epochs=epochs, limit=limit, device=device)
            for seed in range(seeds)
        ]
        most = max(most, *(f["removed"] for f in fits))
        rows.append(
            {
                "λ of block": f"{strength:g}",
                "blocks removed of 9": spread([f["removed"] for f in fits], 1),
                "weight layers": spread([f["layers"] for f in fits], 1),
                "parameters": spread([f["params"] for f in fits], 0),
                "test accuracy": spread([f["test"] for f in fits], 4),
                "training": f"{epochs} epochs of {limit or 50_000:,} images, {device}",
            }
        )
    return Outcome(seeds, rows, [at_least("blocks removed of 9 (most)", most, 6)])


if __name__ == "__main__":
    run("block_sparsity", block_sparsity)
