"""Layer sparsity on a deep MLP: how shallow does it get, what does that cost, and is it better than
starting shallow?"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Goal, Outcome, Spread, at_least, at_most, run, spread
from benchmarks.pictures import before_and_after
from slimfront import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.shipping.network_file import restore, store
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.refit import Refit

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
MOST_LAYERS = 3
WEAK = (0.01, 0.1, 1.0)
STRENGTHS = (5.0, 7.0, 10.0, 15.0, 30.0)
COMBINED = ((0.01, 0.001), (0.1, 0.01), (0.3, 0.03))
"""Strengths of node and connection sparsity tried beside each strength of layer sparsity."""


EARLY_STRENGTHS = (15.0, 20.0, 30.0, 45.0, 60.0, 90.0)
"""The same, where the penalised part is short."""


@dataclass(frozen=True)
class Task:
    """A data set with the training that suits it."""

    data: dict[str, Any]
    epochs: int
    """Of the penalised part."""
    batch_size: int
    refit: Refit
    early: Refit
    """The refit of a network whose layers go early: of as many epochs altogether."""
    compare_forms: bool

    @property
    def all_epochs(self) -> int:
        """Of the penalised part and the refit, and of what is trained without either."""
        return self.epochs + self.refit.epochs

    @property
    def early_epochs(self) -> int:
        """Of the penalised part, where layers go early."""
        return self.all_epochs - self.early.epochs


TASKS = {
    "digits": Task(
        {"name": "digits"},
        epochs=40,
        batch_size=64,
        refit=Refit(epochs=20, lr=3e-3),
        early=Refit(epochs=50, lr=1e-2),
        compare_forms=True,
    ),
    "mnist": Task(
        {"name": "huggingface", "path": str(MNIST)},
        epochs=15,
        batch_size=256,
        refit=Refit(epochs=15, lr=1e-2),
        early=Refit(epochs=28, lr=3e-3),
        compare_forms=False,
    ),
}


@dataclass(frozen=True)
class Fit:
    """One trained network."""

    variant: str
    strength: float
    layers: int
    nonzero: int
    validation: float
    test: float
    network: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training, which gives a network without and, where asked for, one with refit."""

    task: Task
    seed: int
    variant: str
    refitted: str | None
    penalties: dict[str, Any]
    depth: int = 10
    epochs: int | None = None
    """Of the penalised part, if they are not the task's."""
    refit: Refit | None = None
    """If it is not the task's."""


def trained(job: Job) -> Training:
    """The training of a job, at its end."""
    torch.set_num_threads(1)
    candidate = Candidate.model_validate(
        {
            "data": job.task.data,
            "model": {"name": "mlp", "depth": job.depth, "width": 50},
            "training": {
                "epochs": job.epochs or job.task.epochs,
                "batch_size": job.task.batch_size,
                "lr": 3e-3,
                "schedule": "cosine",
                "seed": job.seed,
            },
            "penalties": job.penalties,
            "compaction": {"merge": "always"},  # the fewest layers are what is compared
        }
    )
    training = Training(candidate)
    while not training.done:
        training.run_epoch()
    return training


def fit(job: Job) -> list[Fit]:
    """Trains one candidate; with a refit, both networks come from the same training."""
    training = trained(job)
    fits = []
    refit = job.refit or job.task.refit
    for variant, options in ((job.variant, Refit()), (job.refitted, refit)):
        if variant is None:
            continue
        done = training.finish(options)
        data = training.data
        test = data.task.evaluate(done.compacted.network, *data.test, "test", prepare=data.prepare)[
            "test_accuracy"
        ]
        network = store(
            done.compacted.network, training.candidate.model, data.input_shape, data.head
        )
        m = done.measures
        strength = job.penalties.get("layer", {}).get("strength", 0.0)
        fits.append(
            Fit(
                variant,
                strength,
                int(m["layers"]),
                int(m["nonzero_params"]),
                m["val_accuracy"],
                test,
                network,
            )
        )
    return fits


def jobs(task: Task, seed: int, *, quick: bool) -> list[Job]:
    """All trainings of one seed."""
    strengths = STRENGTHS[1:3] if quick else STRENGTHS
    combined = COMBINED[:1] if quick else COMBINED
    found = [
        Job(task, seed, "dense", None, {}, epochs=task.all_epochs),
        Job(task, seed, "shallow from scratch", None, {}, depth=1, epochs=task.all_epochs),
    ]
    for strength in EARLY_STRENGTHS[1:3] if quick else EARLY_STRENGTHS:
        layer = {"layer": {"strength": strength}}
        early = {"epochs": task.early_epochs, "refit": task.early}
        found.append(Job(task, seed, "", "layer, early + refit", layer, **early))
    weak = (WEAK[:1] if quick else WEAK) if task.compare_forms else ()
    for strength in weak:  # where the gradient form has its range
        for form, variant in (("proximal", "layer"), ("gradient", "gradient")):
            found.append(
                Job(task, seed, variant, None, {"layer": {"strength": strength, "form": form}})
            )
    for strength in strengths:
        layer = {"strength": strength}
        found.append(Job(task, seed, "layer", "layer + refit", {"layer": layer}))
        if task.compare_forms:
            found.append(Job(task, seed, "gradient", None, {"layer": layer | {"form": "gradient"}}))
        for node, connection in combined:
            penalties = {
                "layer": layer,
                "node": {"strength": node},
                "connection": {"strength": connection},
            }
            found.append(Job(task, seed, "", "layer + node + connection + refit", penalties))
    return found


def chosen(fits: list[Fit], variant: str) -> Fit:
    """Of the strengths tried, the one with the best validation accuracy among those of at most 3
    layers (if there are any)."""
    tried = [f for f in fits if f.variant == variant]
    shallow = [f for f in tried if f.layers <= MOST_LAYERS]
    pool = tried if variant == "dense" else shallow or tried
    return max(pool, key=lambda f: f.validation)


def seconds_per_10000(
    networks: list[nn.Module], inputs: torch.Tensor, repeats: int = 9
) -> list[float]:
    """Median seconds of inference of each network on 10,000 inputs, on one thread, all of them
    interleaved."""
    many = inputs.repeat(-(-10_000 // len(inputs)), *[1] * (inputs.dim() - 1))[:10_000]
    times: list[list[float]] = [[] for _ in networks]
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for network, measured in zip(networks, times, strict=True):
                started = time.perf_counter()
                network(many)
                measured.append(time.perf_counter() - started)
    return [statistics.median(measured[2:]) for measured in times]


REFITTED = ("layer + refit", "layer, early + refit", "layer + node + connection + refit")
VARIANTS = ("dense", "layer", *REFITTED, "shallow from scratch")


def layer_sparsity(arguments: argparse.Namespace) -> Outcome:
    """Layer sparsity on an MLP with 10 hidden layers of 50 units, against the dense and the shallow
    network."""
    task = TASKS[arguments.data]
    if arguments.data == "mnist" and not MNIST.exists():
        raise SystemExit("there is no MNIST beside the checkout; see docs/layer-sparsity.md")
    seeds = 1 if arguments.quick else arguments.seeds or 5
    work = [job for seed in range(seeds) for job in jobs(task, seed, quick=arguments.quick)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(fit, work))
    by_seed = [
        [f for job, fits in zip(work, results, strict=True) if job.seed == s for f in fits]
        for s in range(seeds)
    ]
    table = {variant: [chosen(fits, variant) for fits in by_seed] for variant in VARIANTS}
    data = load_once(Candidate.model_validate({"data": task.data}).data, torch.device("cpu"))
    inputs = data.prepare(data.test.inputs)
    times = [
        seconds_per_10000([restore(table[v][s].network) for v in VARIANTS], inputs)
        for s in range(seeds)
    ]
    rows = [
        _row(f"{arguments.data}, {v}", table[v], spread([t[i] for t in times], 4))
        for i, v in enumerate(VARIANTS)
    ]
    every = [f for fits in by_seed for f in fits]
    for strength in sorted({f.strength for f in every if f.variant == "gradient"}):
        for form, variant in (("proximal", "layer"), ("gradient", "gradient")):
            fits = [f for f in every if f.variant == variant and f.strength == strength]
            rows.append(_row(f"{arguments.data}, {form} form, λ = {strength:g}", fits, ""))
    if arguments.picture:
        _draw(task, chosen(by_seed[0], "layer").strength, arguments.picture)
    return Outcome(seeds, rows, _goals(arguments.data, table))


def _draw(task: Task, strength: float, path: Path) -> None:
    """One network of seed 0 before and after compaction."""
    training = trained(Job(task, 0, "layer", None, {"layer": {"strength": strength}}))
    before_and_after(training.model, training.finish(Refit()).compacted.network, path)


def _row(network: str, fits: list[Fit], seconds: Spread | str) -> dict[str, Any]:
    def over(value: Callable[[Fit], float], digits: int) -> Spread:
        return spread([value(f) for f in fits], digits)

    return {
        "network": network,
        "weight layers": over(lambda f: f.layers, 1),
        "non-zero parameters": over(lambda f: f.nonzero, 0),
        "test accuracy": over(lambda f: f.test, 4),
        "seconds per 10,000": seconds,
    }


def _goals(data: str, table: dict[str, list[Fit]]) -> list[Goal]:
    """The refitted network of each seed that is best on validation, of layer sparsity alone or
    combined, against the others."""
    refitted = [
        max(of_seed, key=lambda f: f.validation)
        for of_seed in zip(*(table[v] for v in REFITTED), strict=True)
    ]

    def gains(over: str) -> list[float]:
        return [f.test - other.test for f, other in zip(refitted, table[over], strict=True)]

    over_shallow = gains("shallow from scratch")
    error = 0.0
    if len(over_shallow) > 1:
        error = statistics.stdev(over_shallow) / math.sqrt(len(over_shallow))

    return [
        at_most(
            f"{data}: weight layers with layer sparsity and refit (most)",
            max(f.layers for f in refitted),
            MOST_LAYERS,
        ),
        at_least(
            f"{data}: mean test accuracy with layer sparsity and refit minus dense",
            statistics.mean(gains("dense")),
            0.0,
        ),
        at_least(
            f"{data}: the same minus shallow, and a standard error ({error:.4f}) more",
            statistics.mean(over_shallow) + error,
            0.0,
        ),
    ]


if __name__ == "__main__":
    run(
        "layer_sparsity",
        layer_sparsity,
        ("--data", {"choices": sorted(TASKS), "default": "digits"}),
        ("--seeds", {"type": int, "help": "5 if left out"}),
        ("--picture", {"type": Path, "help": "where to put one network before and after, as PNG"}),
    )
