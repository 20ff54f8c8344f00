"""One training with a strength that rises against one training for each strength: how much of the
front of a whole range of strengths does a fifth of the epochs find?"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks.common import Goal, Outcome, at_least, at_most, run, spread
from slimfront import Candidate
from slimfront.search.record.front.pareto import hypervolume, ranks
from slimfront.trainables.training.loop import Training

FIRST_SEED = 0
EPOCHS = 40
"""Of each training at one strength."""
REFIT = {"epochs": 5, "lr": 3e-3}
STRENGTHS = 12
"""How many trainings share the range of a penalty."""
WHOLE = 10
"""Epochs of a path before its strength begins to rise."""
EVERY = 3
"""Epochs of a path between two networks."""
PATH = WHOLE + EVERY * STRENGTHS
PATH_REFIT = {"epochs": 3, "lr": 3e-3, "when": "reports"}
REGION = 0.05
"""How far below the dense network's accuracy a network may lie to count."""
SHARE = 0.2
"""The epochs that the path may take, as a share of those of separate trainings."""


@dataclass(frozen=True)
class Axis:
    """A penalty, the range of its strength, and what it makes smaller."""

    penalty: str
    low: float
    high: float
    size: str
    model: str

    @property
    def strengths(self) -> list[float]:
        """Of the separate trainings, by equal factors."""
        exponents = np.linspace(0, 1, STRENGTHS)
        ratio = self.high / self.low
        return [self.low * ratio ** float(exponent) for exponent in exponents]


MODELS = {
    "perceptron": {"name": "mlp", "depth": 6, "width": 64},
    "ResNet-14": {"name": "resnet20", "depth": 14, "width": 8},
}
AXES = (
    Axis("connection", 0.03, 3.0, "nonzero_params", "perceptron"),
    Axis("node", 0.1, 10.0, "nonzero_params", "perceptron"),
    Axis("layer", 1.0, 100.0, "layers", "perceptron"),
    Axis("block", 1.0, 100.0, "flops", "ResNet-14"),
)


@dataclass(frozen=True)
class Job:
    """One training."""

    model: str
    seed: int
    epochs: int
    schedule: str
    refit: dict[str, Any]
    penalties: dict[str, Any]
    report_every: int


@dataclass(frozen=True)
class Made:
    """The networks of some trainings, and what all of it cost."""

    networks: list[dict[str, float]]
    epochs: int


def trained(job: Job) -> Made:
    """The networks of a training that are reported, as they would ship."""
    torch.set_num_threads(1)
    candidate = Candidate.model_validate(
        {
            "model": MODELS[job.model],
            "training": {
                "epochs": job.epochs,
                "lr": 3e-3,
                "schedule": job.schedule,
                "seed": job.seed,
            },
            "penalties": job.penalties,
            "refit": job.refit,
            "compaction": {"merge": "always"},
        }
    )
    training = Training(candidate)
    networks = []
    epochs = 0
    while not training.done:
        training.run_epoch()
        epochs += 1
        if training.done or training.epoch % job.report_every == 0:
            made = training.finish(one_shot=False)
            data = training.data
            network = made.compacted.network
            on_test = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
            networks.append(dict(made.measures) | on_test)
            epochs += len(made.history) + int(made.measures.get("recovery_epochs", 0))
    training.close()
    return Made(networks, epochs)


def dense(model: str, seed: int) -> Job:
    """The training that others are compared with."""
    return Job(model, seed, EPOCHS, "cosine", {}, {}, EPOCHS)


def separate(axis: Axis, seed: int) -> list[Job]:
    """A training at each strength."""
    jobs = []
    for strength in axis.strengths:
        penalties = {axis.penalty: {"strength": strength}}
        jobs.append(Job(axis.model, seed, EPOCHS, "cosine", REFIT, penalties, EPOCHS))
    return jobs


def path(axis: Axis, seed: int) -> Job:
    """One training whose strength passes through all of them."""
    rising = {
        "strength": axis.high,
        "warmup": WHOLE,
        "ramp": PATH - WHOLE,
        "ramp_from": axis.low / axis.high,
    }
    return Job(axis.model, seed, PATH, "constant", PATH_REFIT, {axis.penalty: rising}, EVERY)


def volume(networks: Sequence[dict[str, float]], size: str, whole: dict[str, float]) -> float:
    """The hypervolume of test error and size, of networks that are a front by validation: from 0
    to 1, that of a network of no size that is as good as the dense one.

    Accuracy counts from `REGION` below the dense network's to it, and no further: the best of
    more networks is better by luck alone.
    """
    found = []
    shown = []
    for network in networks:
        share = network[size] / whole[size]
        found.append([-network["val_accuracy"], share])
        lost = whole["test_accuracy"] - network["test_accuracy"]
        shown.append([max(lost, 0.0) / REGION, share])
    is_front = ranks(np.array(found)) == 0
    reference = np.array([1.0, 1.0])
    return hypervolume(np.array(shown)[is_front], reference)


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """The front of a range of strengths from one training, against a training for each."""
    count = 1 if arguments.quick else arguments.seeds
    axes = AXES[:1] if arguments.quick else AXES
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for axis in axes:
            wholes = [dense(axis.model, seed) for seed in seeds]
            whole = [made.networks[-1] for made in pool.map(trained, wholes)]
            apart = [list(pool.map(trained, separate(axis, seed))) for seed in seeds]
            along = list(pool.map(trained, [path(axis, seed) for seed in seeds]))
            of_apart = []
            of_along = []
            for network, trainings, one in zip(whole, apart, along, strict=True):
                found = [made.networks[-1] for made in trainings]
                of_apart.append(volume(found, axis.size, network))
                of_along.append(volume(one.networks, axis.size, network))
            epochs = sum(made.epochs for made in apart[0])
            rows.append(_row(axis, "separate", epochs, of_apart))
            rows.append(_row(axis, "path", along[0].epochs, of_along))
            ratio = math.fsum(of_along) / math.fsum(of_apart)
            goals.append(at_least(f"{axis.penalty}: hypervolume, path / separate", ratio, 0.95))
            share = along[0].epochs / epochs
            goals.append(at_most(f"{axis.penalty}: epochs, path / separate", share, SHARE))
    return Outcome(count, rows, goals)


def _row(axis: Axis, name: str, epochs: int, volumes: Sequence[float]) -> dict[str, Any]:
    return {
        "network": axis.model,
        "penalty": axis.penalty,
        "strengths": f"{axis.low:g} to {axis.high:g}",
        "trainings": name,
        "epochs": epochs,
        "size": axis.size,
        "hypervolume": spread(volumes),
    }


if __name__ == "__main__":
    run("strength_path", benchmark, ("--seeds", {"type": int, "default": 5}))
