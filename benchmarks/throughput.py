"""Trials per hour and core-seconds per trial: a user's own assembly, ours, and the bare training
loop."""

import argparse
import contextlib
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.search.optuna import OptunaSearch
from torch.nn.functional import avg_pool2d

from benchmarks.common import Goal, Outcome, at_least, at_most, run
from benchmarks.cores import Cores
from benchmarks.layer_sparsity import MNIST
from benchmarks.where import where
from benchmarks.workloads import NETWORKS, Workload, assembled, epochs, splits
from slimfront.search.config.schema import Config
from slimfront.search.engine.driver_only import DriverOnly
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.data import HuggingFace

LR, STRENGTH = (1e-3, 1e-2), (1e-5, 1e-3)
PACK = 16
SLOW = ("resnet20", "vgg11")
"""Networks of which a trial takes a quarter of a minute."""
WARM = 1
"""So many of our trials with them are not counted for core-seconds. They run one at a time: between
the ends of two trials there is one whole trial then, and no part of another."""


@dataclass
class Taken:
    """What a search took: (wall seconds, core-seconds by kind of process) since its beginning, at
    each end of a trial."""

    cores: Cores = field(default_factory=Cores)
    start: tuple[float, Counter[str]] | None = None
    """The same when the first trial began."""
    ends: list[tuple[float, Counter[str]]] = field(default_factory=list)

    def look(self) -> tuple[float, Counter[str]]:
        """What was taken so far."""
        return time.monotonic() - self.cores.begun, self.cores.look()

    def begin(self) -> None:
        """A trial begins."""
        self.start = self.start or self.look()

    def mark(self) -> None:
        """Another trial has ended."""
        self.ends.append(self.look())

    def close(self) -> None:
        """The search is over."""
        self.cores.close()
        self.wall = time.monotonic() - self.cores.begun

    def rate(self) -> float:
        """Trials per hour from the beginning of the first to the end of the last."""
        assert self.start is not None
        return 3600 * len(self.ends) / (self.ends[-1][0] - self.start[0])

    def total_rate(self) -> float:
        """Trials per hour of the whole: from before Ray is started until the search has
        returned."""
        return 3600 * len(self.ends) / self.wall

    def core_seconds(self, warm: int = 0) -> dict[str, float]:
        """Per trial in the time of `rate`, by kind of process; of those that end after the first
        `warm`."""
        assert self.start is not None
        _, first = self.ends[warm - 1] if warm else self.start
        _, last = self.ends[-1]
        count = len(self.ends) - warm
        return {kind: (last[kind] - first[kind]) / count for kind in last}


class Ends(Progress):
    """Marks the ends of our trials; the dense reference is none of them."""

    def __init__(self, taken: Taken) -> None:
        self.taken = taken

    def update(self, ledger: Ledger) -> None:
        """Called at each event."""
        self.taken.begin()
        if len(ledger.trials) - ledger.counts["running"] > len(self.taken.ends):
            self.taken.mark()


class Callback(DriverOnly, tune.Callback):
    """Marks the ends of the assembled stack's trials."""

    def __init__(self, taken: Taken) -> None:
        self.taken = taken

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Called by Ray."""
        self.taken.begin()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """The same."""
        self.taken.mark()


def by_hand(workload: Workload, trials: int, directory: Path) -> Taken:
    """Ray Tune with OptunaSearch and MLflowLoggerCallback on SQLite."""
    taken = Taken()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(assembled, workload=workload), {"cpu": 1}),
        param_space={"lr": tune.loguniform(*LR), "strength": tune.loguniform(*STRENGTH)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                metric=["val_accuracy", "nonzero_params"],
                mode=["max", "min"],
                study_name=directory.name,
            ),
            num_samples=trials,
            max_concurrent_trials=1 if workload.network in SLOW else None,
        ),
        run_config=tune.RunConfig(
            storage_path=str(directory / "ray"),
            verbose=0,
            callbacks=[
                MLflowLoggerCallback(
                    tracking_uri=f"sqlite:///{directory}/mlflow.db", experiment_name="assembled"
                ),
                Callback(taken),
            ],
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):  # where it says what it did; ours is the table's
        tuner.fit()
    taken.close()
    ray.shutdown()
    return taken


def config_of(
    workload: Workload, trials: int, directory: Path, pack: int = 1, *, one_shot: bool = True
) -> Config:
    """The same search as a config of ours."""
    factory = {
        "name": "factory",
        "factory": "benchmarks.workloads:examples",
        "args": {"file": workload.file},
    }
    return Config.model_validate(
        {
            "name": "throughput",
            "data": "digits" if workload.file is None else factory,
            "model": {"factory": f"benchmarks.workloads:{workload.network}"},
            "training": {
                "epochs": workload.epochs,
                "batch_size": workload.batch_size,
                "optimizer": "adam",
            },
            "penalties": {"connection": {"strength": 1e-4}},
            "space": {
                "training.lr": {"low": LR[0], "high": LR[1], "log": True},
                "penalties.connection.strength": {
                    "low": STRENGTH[0],
                    "high": STRENGTH[1],
                    "log": True,
                },
            },
            "objectives": ["val_accuracy", "nonzero_params"],
            "search": {
                "trials": trials,
                "storage_path": str(directory / "runs"),
                "concurrency": 1 if workload.network in SLOW else "auto",
            },
            "resources": {"pack": pack},
            "one_shot": {} if one_shot else {"steps": 0},
            "tracking": {"uri": f"sqlite:///{directory}/mlflow.db"},
        }
    )


def ours(
    workload: Workload, trials: int, directory: Path, pack: int = 1, *, one_shot: bool = True
) -> Taken:
    """A search of ours."""
    taken = Taken()
    start_local_ray()
    run_search(config_of(workload, trials, directory, pack, one_shot=one_shot), Ends(taken))
    taken.close()
    ray.shutdown()
    return taken


def bare(workload: Workload, *, fused: bool | None) -> float:
    """Core-seconds of a plain training loop without any penalty, in this process, with one
    thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, model = splits(workload.file), NETWORKS[workload.network]()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=fused)
    begun = time.process_time()
    for _ in epochs(model, optimizer, data, workload, 0.0):
        pass
    spent = time.process_time() - begun
    torch.set_num_threads(threads)
    return spent


Way = Callable[[Workload, int, Path], Taken]
ASSEMBLED, OURS, PACKED = "(a) assembled by hand", "(b) ours", f"(c) ours, packs of {PACK}"
PLAIN = "(b) ours, without one-shot pruning"
WAYS: dict[str, Way] = {
    ASSEMBLED: by_hand,
    OURS: ours,
    PACKED: functools.partial(ours, pack=PACK),
}
CONVOLUTIONAL: dict[str, Way] = {
    ASSEMBLED: by_hand,
    OURS: ours,
    PLAIN: functools.partial(ours, one_shot=False),
}
"""On a CPU a pack of convolutional networks takes as long as they do one by one."""


def compare(workload: Workload) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a workload, and the medians over the rounds of what the goals are about; all ways
    in each round."""
    ways = CONVOLUTIONAL if workload.network in SLOW else WAYS
    trials = dict(zip(ways, workload.trials, strict=True))
    rounds = workload.rounds
    found: dict[str, list[Taken]] = {name: [] for name in ways}
    loops: dict[bool | None, list[float]] = {None: [], True: []}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for place, name in enumerate(list(ways) if turn % 2 == 0 else reversed(ways)):
                for fused, spent in loops.items():
                    slow = workload.network in SLOW
                    if slow and place > 0:
                        break
                    spent.append(min(bare(workload, fused=fused) for _ in range(1 if slow else 2)))
                directory = Path(folder, f"{turn}-{list(ways).index(name)}")
                directory.mkdir()
                found[name].append(ways[name](workload, trials[name], directory))
    plain, fused_loop = statistics.median(loops[None]), statistics.median(loops[True])
    first = found[next(iter(WAYS))]
    rows, values = [], {}
    for name, taken in found.items():
        ratios = [mine.rate() / other.rate() for mine, other in zip(taken, first, strict=True)]
        # Few and long trials: what their process imports counts in the first one alone.
        warm = WARM if workload.network in SLOW and name != ASSEMBLED else 0
        spent = [sum(t.core_seconds(warm).values()) for t in taken]
        kinds = {
            kind: statistics.median(t.core_seconds(warm)[kind] for t in taken)
            for kind in ("trials", "driver", "Ray")
        }
        with_start = statistics.median(t.total_rate() for t in taken)
        cores = statistics.median(spent)
        parts = ", ".join(f"{seconds:.3f}" for seconds in kinds.values())
        rows.append(
            {
                "workload": workload.name,
                "search": name,
                "trials": f"{rounds} × {trials[name]}",
                "trials per hour": f"{statistics.median(t.rate() for t in taken):,.0f}",
                "over (a): median (range)": (
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                ),
                "trials per hour with Ray's start": f"{with_start:,.0f}",
                "core-seconds per trial (in trials, driver, Ray)": f"{cores:.3f} ({parts})",
                "over the bare loop": f"{cores / plain:.2f}",
                "over the fused one": f"{cores / fused_loop:.2f}",
            }
        )
        values[f"{name} rate"], values[f"{name} cores"] = (
            statistics.median(ratios),
            statistics.median(spent) / plain,
        )
    for name, seconds in (
        ("bare loop, Adam as it comes", plain),
        ("bare loop, fused Adam", fused_loop),
    ):
        shown = {
            "workload": workload.name,
            "search": name,
            "core-seconds per trial (in trials, driver, Ray)": f"{seconds:.3f}",
        }
        rows.append(dict.fromkeys(rows[0], "") | shown)
    return rows, values


def workloads(directory: Path, *, quick: bool) -> list[Workload]:
    """Digits; beside it the MNIST MLP, and a small residual network on a subset."""
    digits = Workload("digits MLP", "mlp", 20, 64)
    if quick:
        return [replace(digits, trials=(4, 12, 32), rounds=1)]
    files = {"mnist.pt": None, "subset.pt": 2000}
    data = HuggingFace(path=str(MNIST)).load()
    for name, count in files.items():
        torch.save(
            (data.train.inputs[:count].float(), data.train.targets[:count]), directory / name
        )
    images, labels = torch.load(directory / "subset.pt")
    torch.save((avg_pool2d(images, 2), labels), directory / "pooled.pt")
    mnist, subset, pooled = (
        str(directory / f"{name}.pt") for name in ("mnist", "subset", "pooled")
    )
    return [
        digits,
        Workload("MNIST MLP", "deep_mlp", 3, 256, mnist, (4, 12, 32), rounds=1),
        Workload("ResNet-20 on 2,000 of MNIST, pooled", "resnet20", 15, 64, pooled, (2, 4, 4)),
        Workload("VGG-11 on 2,000 of MNIST", "vgg11", 15, 64, subset, (2, 4, 4)),
    ]


def throughput(arguments: argparse.Namespace) -> Outcome:
    """Trials per hour and core-seconds per trial, also with Ray's start; `--profile [PACK]`: where
    a trial's goes, of digits or of the workload that `--only` names."""
    logging.getLogger().setLevel(logging.ERROR)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "0"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if arguments.profile:
            profiled = next(
                workload
                for workload in workloads(Path(folder), quick=not arguments.only)
                if not arguments.only or arguments.only in workload.name
            )
            slow = profiled.network in SLOW
            plain = min(bare(profiled, fused=None) for _ in range(1 if slow else 4))
            trials = 16 if arguments.quick or slow else 64
            if arguments.profile > 1:
                trials = 12 * arguments.profile
            return where(
                functools.partial(config_of, profiled, pack=arguments.profile), trials, plain
            )
        rows: list[dict[str, Any]] = []
        goals: list[Goal] = []
        rounds = 1
        for workload in workloads(Path(folder), quick=arguments.quick):
            if arguments.only and arguments.only not in workload.name:
                continue
            found, values = compare(workload)
            rounds = max(rounds, workload.rounds)
            rows += found
            goals += goals_of(workload, values)
    return Outcome(rounds, rows, goals)


def goals_of(workload: Workload, values: dict[str, float]) -> list[Goal]:
    """What a workload should reach."""
    if workload.network in SLOW:
        name = f"core-seconds per trial over the bare loop, {workload.name}"
        return [
            at_most(f"{name}, (b)", values[f"{OURS} cores"], 1.15),
            at_most(f"{name}, (b) without one-shot pruning", values[f"{PLAIN} cores"], 1.05),
        ]
    if workload.file is not None:
        return []
    cores = "core-seconds per trial, (b) over the bare loop, digits"
    return [
        at_least("trials per hour, (b) over (a), digits", values[f"{OURS} rate"], 10),
        at_least("trials per hour, (c) over (a), digits", values[f"{PACKED} rate"], 25),
        at_most(cores, values[f"{OURS} cores"], 1.25),
    ]


if __name__ == "__main__":
    told = "where the time of a trial goes, one by one or in packs of so many"
    run(
        "throughput",
        throughput,
        ("--only", {"help": "a workload, by a part of its name"}),
        ("--profile", {"nargs": "?", "const": 1, "type": int, "metavar": "PACK", "help": told}),
    )
