"""Block sparsity whose strength is weighed by what a branch costs: which blocks of a ResNet-20 go,
and at what price."""

import argparse
from pathlib import Path

import torch

from benchmarks.common import Outcome, run, spread
from slimfront import Candidate
from slimfront.trainables.training.loop import Training

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
COSTS = ("none", "flops", "params")
STRENGTHS = (1.5, 2.0, 3.0)
"""In units of the training: see `penalties.relative`."""
EPOCHS, IMAGES, SEEDS = 6, 4000, 3


def train_one(cost: str, strength: float, seed: int, epochs: int, limit: int) -> dict[str, float]:
    """One ResNet-20, compacted and refitted: its measures."""
    candidate = Candidate.model_validate(
        {
            "data": {
                "name": "huggingface",
                "path": str(CIFAR),
                "validation": 0.1,
                "limit": limit,
                "augment": {"crop": 4, "flip": True},
            },
            "model": "resnet20",
            "training": {
                "epochs": epochs,
                "batch_size": 64,
                "optimizer": "sgd",
                "lr": 0.1,
                "weight_decay": 5e-4,
                "schedule": "cosine",
                "seed": seed,
            },
            "penalties": {"block": {"strength": strength, "relative": True, "cost": cost}},
            "refit": {"epochs": max(1, epochs // 2), "lr": 2e-3},
        }
    )
    training = Training(candidate, "cpu")
    while not training.done:
        training.run_epoch()
    finished = training.finish()
    data = training.data
    tested = data.task.evaluate(
        finished.compacted.network, *data.test, "test", prepare=data.prepare
    )
    removed = finished.compacted.report.count("block removed")
    return finished.measures | {"removed": removed, "test": tested["test_accuracy"]}


def block_cost(arguments: argparse.Namespace) -> Outcome:
    """Strengths alike for all branches, and by what they cost."""
    if not CIFAR.exists():
        raise SystemExit("there is no CIFAR-10 beside the checkout; see docs/layer-sparsity.md")
    torch.set_num_threads(1)
    epochs, images, seeds, strengths = EPOCHS, IMAGES, SEEDS, STRENGTHS
    if arguments.quick:
        epochs, images, seeds, strengths = 1, 1000, 1, STRENGTHS[:1]
    rows = []
    for strength in strengths:
        for cost in COSTS:
            fits = [train_one(cost, strength, seed, epochs, images) for seed in range(seeds)]
            rows.append(
                {
                    "strength": f"{strength:g}",
                    "cost": cost,
                    "blocks removed of 9": spread([fit["removed"] for fit in fits], 1),
                    "weight layers": spread([fit["layers"] for fit in fits], 1),
                    "parameters": spread([fit["params"] for fit in fits], 0),
                    "MFLOPs": spread([fit["flops"] / 1e6 for fit in fits], 1),
                    "test accuracy": spread([fit["test"] for fit in fits], 4),
                }
            )
    return Outcome(seeds, rows, [])


if __name__ == "__main__":
    run("block_cost", block_cost)
