"""Compact networks from a trained one: from its weights against from scratch, with and without
distillation, and pruned without training with and without recovery.

A small convolutional network on MNIST and a ResNet-8 on CIFAR-10 pooled to 16×16 are trained dense;
then `channels` makes each smaller, to three sizes. Without the folders of `--data`, both train on
scikit-learn's digits.
"""

import argparse
import io
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.common import Goal, Outcome, at_least, run, spread
from slimfront import Candidate, train
from slimfront.trainables.training.loop import Training

EPOCHS = 9
"""Of a dense network, and of one that is trained from scratch."""
FROM_WEIGHTS = EPOCHS // 3
SIZES = (0.75, 0.9, 0.955)
"""Shares of the parameters that go, in whole channels."""
SMALL = 0.05
"""At most so much of the dense network's parameters counts as small."""
FIRST_SEED = 100


@dataclass(frozen=True)
class Workload:
    """A network and its data."""

    folder: str
    model: dict[str, Any]
    count: int
    """Of the images that are trained on, with those held out of them for validation."""
    pool: int
    lr: float


WORKLOADS = {
    "CNN, MNIST": Workload("mnist", {"factory": "benchmarks.pretrained:cnn"}, 4500, 1, 3e-3),
    "ResNet-8, CIFAR-10": Workload(
        "cifar10", {"name": "resnet20", "depth": 8, "width": 8}, 6000, 2, 1e-2
    ),
}
TESTED = 5000
"""So many images of the test file."""
METHODS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": EPOCHS},
    "from scratch, distilled": {"epochs": EPOCHS, "distilled": True},
    "from weights": {"epochs": FROM_WEIGHTS, "weights": True, "lr": 3},
    "from weights, distilled": {
        "epochs": FROM_WEIGHTS,
        "weights": True,
        "lr": 3,
        "distilled": True,
    },
    "not trained": {"epochs": 0, "weights": True},
    "not trained, recovered": {"epochs": 0, "weights": True, "refit": 1},
    "not trained, recovered, distilled": {
        "epochs": 0,
        "weights": True,
        "refit": 1,
        "distilled": True,
    },
}


def cnn() -> nn.Module:
    """Two convolutions and two linear layers; for any size of images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@cache
def images(folder: str, count: int, pool: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first examples of a data set, by split: images (N, channels, height, width), pooled, and
    labels."""
    if not Path(folder, "train.parquet").is_file():
        inputs, labels = load_digits(return_X_y=True)
        return {"train": (torch.tensor(inputs).float().view(-1, 1, 8, 8), torch.tensor(labels))}
    return {
        "train": read_images(Path(folder, "train.parquet"), count, pool),
        "test": read_images(Path(folder, "test.parquet"), TESTED, pool),
    }


def read_images(file: Path, count: int, pool: int) -> tuple[Tensor, Tensor]:
    """The first examples of a file: images (N, channels, height, width), pooled, and labels."""
    rows = pyarrow.parquet.read_table(file).slice(0, count).to_pydict()
    made = []
    for image in rows["image"]:
        pixels = np.array(Image.open(io.BytesIO(image["bytes"])))
        made.append(torch.tensor(pixels).float().view(*pixels.shape[:2], -1).permute(2, 0, 1))
    pooled = nn.functional.avg_pool2d(torch.stack(made), pool)
    return pooled, torch.tensor(rows["label"])


@dataclass(frozen=True)
class Job:
    """One dense training, and all that is made of it."""

    workload: str
    seed: int
    folder: str
    epochs: int


@dataclass(frozen=True)
class Result:
    """A compact network: its share of the dense network's parameters, and its accuracy on the test
    split."""

    share: float
    accuracy: float


def candidate(job: Job, epochs: int, **parts: Any) -> Candidate:
    """What all methods train."""
    workload = WORKLOADS[job.workload]
    where = {"folder": job.folder, "count": workload.count, "pool": workload.pool}
    tree: dict[str, Any] = {
        "data": {"name": "factory", "factory": "benchmarks.pretrained:images", "args": where},
        "model": workload.model,
        "training": {
            "epochs": epochs,
            "batch_size": 64,
            "lr": workload.lr,
            "schedule": "cosine",
            "seed": job.seed,
        },
        "one_shot": {"steps": 0},
    }
    return Candidate.model_validate(tree | parts)


def results(job: Job) -> dict[tuple[str, float], Result]:
    """By method and size; the dense network as size 0."""
    torch.set_num_threads(1)
    training = Training(candidate(job, job.epochs))
    while not training.done:
        training.run_epoch()
    data = training.data
    params = sum(parameter.numel() for parameter in training.model.parameters())

    def result(network: nn.Module) -> Result:
        scores = data.task.evaluate(network, *data.test, "test", data.prepare)
        left = sum(parameter.numel() for parameter in network.parameters())
        return Result(left / params, scores["test_accuracy"])

    found = {("dense", 0.0): result(training.model)}
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "dense.pt"))
        torch.save(training.model.state_dict(), weights)
        for method, options in METHODS.items():
            for size in SIZES:
                network = _made(job, weights, options, size)
                found[method, size] = result(network)
    return found


def _made(job: Job, weights: str, options: dict[str, Any], size: float) -> nn.Module:
    workload = WORKLOADS[job.workload]
    epochs = round(options["epochs"] / EPOCHS * job.epochs)
    parts: dict[str, Any] = {
        "sparsifier": {
            "name": "channels",
            "of": "params",
            "sparsity": size,
        }
    }
    if options.get("weights"):
        parts["model"] = workload.model | {"weights": weights}
    if options.get("distilled"):
        parts["distill"] = {"teacher": weights}
    if "refit" in options:
        parts["refit"] = {"epochs": options["refit"], "lr": workload.lr / 3}
    made = candidate(job, epochs, **parts)
    faster = {"lr": workload.lr * options.get("lr", 1)}
    training = made.training.model_copy(update=faster)
    return train(made.model_copy(update={"training": training})).compacted.network


def pretrained(arguments: argparse.Namespace) -> Outcome:
    """From weights against from scratch, with and without distillation and recovery."""
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if arguments.quick else arguments.seeds))
    workloads = list(WORKLOADS)[:1] if arguments.quick else list(WORKLOADS)
    epochs = 3 if arguments.quick else EPOCHS
    jobs = []
    for workload in workloads:
        folder = ""
        if not arguments.quick:
            folder = str(Path(arguments.data, WORKLOADS[workload].folder).absolute())
        jobs += [Job(workload, seed, folder, epochs) for seed in seeds]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(results, jobs), strict=True))
    rows = []
    goals = []
    for workload in workloads:
        of_workload = [made for job, made in found.items() if job.workload == workload]
        rows += _rows(workload, of_workload, epochs)
        goals += _goals(workload, of_workload)
    return Outcome(len(seeds), rows, goals)


def _rows(
    workload: str, found: list[dict[tuple[str, float], Result]], of_dense: int
) -> list[dict[str, Any]]:
    rows = []
    for method, size in found[0]:
        of_each = [made[method, size] for made in found]
        epochs = of_dense
        if method in METHODS:
            share = METHODS[method]["epochs"] / EPOCHS
            epochs = round(share * of_dense) + METHODS[method].get("refit", 0)
        rows.append(
            {
                "network": workload,
                "method": method,
                "parameters that go": f"{size:.1%}",
                "epochs": epochs,
                "parameters, % of dense": spread([100 * one.share for one in of_each], 1),
                "test accuracy, %": spread([100 * one.accuracy for one in of_each], 1),
            }
        )
    return rows


def _gains(
    found: list[dict[tuple[str, float], Result]], method: str, than: str
) -> dict[float, float]:
    """How many points of accuracy a method is ahead of another on average, by size."""
    gains = {}
    for size in SIZES:
        of_seeds = [made[method, size].accuracy - made[than, size].accuracy for made in found]
        gains[size] = 100 * statistics.mean(of_seeds)
    return gains


def _goals(workload: str, found: list[dict[tuple[str, float], Result]]) -> list[Goal]:
    goals = []
    for start in ("from scratch", "from weights"):
        gains = _gains(found, f"{start}, distilled", start)
        goals.append(
            at_least(f"{workload}: points by distillation, {start}, least", min(gains.values()), 0)
        )
        small = [
            gains[size]
            for size in SIZES
            if statistics.mean(made[start, size].share for made in found) <= SMALL
        ]
        if small:
            name = f"{workload}: the same, at most {SMALL:.0%} of the parameters"
            goals.append(at_least(name, min(small), 0.5))
    for method in ("from weights", "from weights, distilled"):
        gains = _gains(found, method, "from scratch")
        name = f"{workload}: points of a third of the epochs {method} over scratch, least"
        goals.append(at_least(name, min(gains.values()), 0))
    return goals


if __name__ == "__main__":
    run(
        "pretrained",
        pretrained,
        ("--data", {"default": "../shared/data", "help": "folder with mnist/ and cifar10/"}),
        ("--seeds", {"type": int, "default": 5}),
        ("--jobs", {"type": int, "default": 2}),
    )
