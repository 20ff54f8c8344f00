"""A path of strengths: one training in which the strength of a penalty rises, whose networks on the
way are refitted briefly, beside a training for each strength, on digits."""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks.common import Goal, Outcome, at_least, at_most, run, spread
from slimfront import Candidate
from slimfront.search.record.front.pareto import hypervolume
from slimfront.trainables.training.finishing import Trained
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.refit import Refit

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "MLP, node": ({"name": "mlp", "depth": 5, "width": 64}, "node"),
    "ResNet-8, channel": ({"name": "resnet20", "depth": 8, "width": 8}, "channel"),
}
"""Networks, and the penalty whose strength varies."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Of the separate trainings, in units of the training; the path ends with the last."""
EPOCHS = 30
REFIT = Refit(epochs=2, lr=3e-3)
LR = 3e-3
FIRST_SEED = 100
SHARE = 0.95
"""The path should reach so much of the hypervolume of the separate trainings."""


@dataclass(frozen=True)
class Job:
    """All trainings of one network with one seed."""

    model: str
    seed: int
    epochs: int


@dataclass(frozen=True)
class Result:
    """The hypervolume of a front over quality and parameters, and the epochs that it took."""

    hypervolume: float
    epochs: int


def candidate(job: Job, strength: float, *, rises: bool) -> Candidate:
    """A training with that strength, or one in which it rises to that all the time."""
    model, penalty = MODELS[job.model]
    options = {"strength": strength, "relative": True, "ramp": job.epochs if rises else 0}
    training = {
        "epochs": job.epochs,
        "batch_size": 64,
        "lr": LR,
        "schedule": "constant" if rises else "cosine",
        "seed": job.seed,
    }
    return Candidate.model_validate(
        {
            "model": model,
            "training": training,
            "penalties": {penalty: options},
            "one_shot": {"steps": 0},
        }
    )


def separately(job: Job) -> tuple[list[Trained], int]:
    """A training for each strength; what came out, and the epochs."""
    found = []
    for strength in STRENGTHS:
        training = Training(candidate(job, strength, rises=False))
        while not training.done:
            training.run_epoch()
        found.append(training.finish())
        training.close()
    return found, len(STRENGTHS) * job.epochs


def along_a_path(job: Job) -> tuple[list[Trained], int]:
    """One training; its networks on the way, refitted, and all epochs."""
    training = Training(candidate(job, STRENGTHS[-1], rises=True))
    every = max(job.epochs // (len(STRENGTHS) - 1), 1)
    found = []
    while not training.done:
        training.run_epoch()
        if training.epoch % every == 0 or training.done:
            found.append(training.finish(REFIT))
    training.close()
    return found, job.epochs + REFIT.epochs * len(found)


def fit(job: Job) -> dict[str, Result]:
    """Both ways."""
    torch.set_num_threads(1)
    plain = Training(candidate(job, 0.0, rises=False))
    whole = plain.finish(Refit(epochs=0)).measures["params"]
    plain.close()
    results = {}
    for name, way in (("a training for each", separately), ("a path", along_a_path)):
        found, epochs = way(job)
        losses = [
            [1 - one.measures["val_accuracy"], one.measures["params"] / whole] for one in found
        ]
        volume = hypervolume(np.array(losses, dtype=np.float64), np.ones(2))
        results[name] = Result(volume, epochs)
    return results


def strength_path(arguments: argparse.Namespace) -> Outcome:
    """The hypervolume over validation accuracy and the share of parameters, and the epochs."""
    seeds, epochs, models = arguments.seeds, EPOCHS, list(MODELS)
    if arguments.quick:
        seeds, epochs, models = 1, 10, models[:1]
    used = range(FIRST_SEED, FIRST_SEED + seeds)
    work = [Job(model, seed, epochs) for model in models for seed in used]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = dict(zip(work, pool.map(fit, work), strict=True))
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for model in models:
        of_model = [results for job, results in found.items() if job.model == model]
        for way in of_model[0]:
            volumes = [results[way].hypervolume for results in of_model]
            spent = of_model[0][way].epochs
            row = {"network": model, "way": way, "hypervolume": spread(volumes, 3)}
            rows.append(row | {"epochs": spent})
        apart, path = of_model[0]
        ratios = [one[path].hypervolume / one[apart].hypervolume for one in of_model]
        mean = statistics.mean(ratios)
        goals.append(at_least(f"{model}: hypervolume, the path's over the others'", mean, SHARE))
        share = of_model[0][path].epochs / of_model[0][apart].epochs
        goals.append(at_most(f"{model}: epochs, the path's over the others'", share, 0.25))
    return Outcome(seeds, rows, goals)


if __name__ == "__main__":
    run("strength_path", strength_path, ("--seeds", {"type": int, "default": 5}))
