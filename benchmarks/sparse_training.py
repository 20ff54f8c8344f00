"""Sparse training with and without CKA-SR: every sparsifier, several sparsities, paired over
seeds."""

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.common import Outcome, run, spread
from slimfront import Candidate
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.loop import Training

SPARSITIES = (0.90, 0.95, 0.98, 0.99)
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "CKA-SR": {"cka": {"strength": 1e-4, "samples": 8, "every": 1}},
    "AugCKA-SR": {"aug_cka": {"strength": 1e-2, "samples": 8, "every": 1}},
}
"""CKA-SR at the authors' β. AugCKA-SR is a mean over pairs, so that its β is larger."""

EVERY = {"set": 40, "rigl": 40, "granet": 20}
"""Steps between updates of the masks: trainings here are short."""


@dataclass(frozen=True)
class Job:
    """One training."""

    sparsifier: dict[str, Any] | None
    penalty: str
    seed: int
    epochs: int


def candidate(job: Job) -> Candidate:
    """ResNet-8 on scikit-learn's digits; `benchmarks.fidelity` is on CIFAR-10."""
    training = {
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "cosine",
    }
    return Candidate.model_validate(
        {
            "data": {"name": "digits"},
            "model": {"name": "resnet20", "depth": 8, "width": 16},
            "training": training | {"epochs": job.epochs, "seed": job.seed},
            "penalties": PENALTIES[job.penalty],
            "sparsifier": job.sparsifier,
        }
    )


def fit(job: Job) -> float:
    """Test accuracy at the end of training; nothing is chosen by it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    training = Training(candidate(job), device)
    while not training.done:
        training.run_epoch()
    training.close()
    data = training.data
    found = data.task.evaluate(training.model, *data.test, "test", prepare=data.prepare)
    return found["test_accuracy"]


def sparsifiers(sparsities: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every sparsifier at every sparsity; N:M masks at theirs."""
    # Of weights, to a free target.
    names = [name for name in sorted(SPARSIFIERS) if name not in ("nm", "channels")]
    every = {name: {"every": EVERY[name]} if name in EVERY else {} for name in names}
    return [{"name": name, "sparsity": s} | every[name] for s in sparsities for name in names] + [
        {"name": "nm"}
    ]


def paired(values: list[float], baseline: list[float]) -> str:
    """The mean difference in points, and its standard error over seeds."""
    differences = [100 * (a - b) for a, b in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    return (
        f"{statistics.mean(differences):+.2f} ± "
        f"{statistics.stdev(differences) / math.sqrt(len(differences)):.2f}"
    )


def sparse_training(arguments: argparse.Namespace) -> Outcome:
    """Test accuracy of every sparsifier with no penalty, CKA-SR and AugCKA-SR."""
    seeds, epochs = (1, 4) if arguments.quick else (arguments.seeds or 5, 20)
    methods = sparsifiers(SPARSITIES[:1] if arguments.quick else SPARSITIES)
    cells: list[tuple[dict[str, Any] | None, str]] = [
        (None, "none"),
        *((m, p) for m in methods for p in PENALTIES),
    ]
    work = [
        Job(method, penalty, seed, epochs) for method, penalty in cells for seed in range(seeds)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = dict(zip([str(job) for job in work], pool.map(fit, work), strict=True))

    def accuracies(method: dict[str, Any] | None, penalty: str) -> list[float]:
        return [results[str(Job(method, penalty, seed, epochs))] for seed in range(seeds)]

    rows = []
    for method in (None, *methods):
        plain = accuracies(method, "none")
        row: dict[str, Any] = {
            "sparsifier": method["name"] if method else "dense",
            "sparsity": (f"{method['sparsity']:.2f}" if "sparsity" in method else "0.50 (2:4)")
            if method
            else "0",
            "test accuracy": spread(plain, 4),
        }
        for name in list(PENALTIES)[1:]:
            row[f"with {name}, points"] = paired(accuracies(method, name), plain) if method else ""
        rows.append(row)
    return Outcome(seeds, rows, [])


if __name__ == "__main__":
    run(
        "sparse_training",
        sparse_training,
        ("--seeds", {"type": int, "help": "5 if left out"}),
    )
