"""How far the figures of a front can be trusted: the main job's members as the search measured
them, and their means over five seeds, beside twenty trainings with fresh seeds."""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.common import Goal, Outcome, at_least, at_most, run, spread
from benchmarks.main_job import CONFIG
from slimfront.search.config.schema import Config
from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.session import read_result
from slimfront.search.record.trials import MeasuredNetwork

REPEATED, FRESH = 5, 20
"""How many trainings the bars are of, and how many others they are judged by."""
VALIDATION, TEST = "val_accuracy", "test_accuracy"


def _normally(errors: float) -> float:
    """How often normal values lie within so many of their standard errors, estimated from five."""
    return float(2 * stats.t.cdf(errors, REPEATED - 1) - 1)


_SINGLE = _normally(1 / math.sqrt(1 + 1 / REPEATED))
_MEANS = _normally(2 / math.sqrt(1 + REPEATED / FRESH))
_LESS = 0.1
"""So much less counts as met: members of one front are not independent."""


@dataclass(frozen=True)
class Member:
    """One network of a front: what the search measured, and what trainings of the same with other
    seeds gave."""

    found: dict[str, float]
    repeated: dict[str, list[float]]
    fresh: dict[str, list[float]]

    def repeated_mean(self, name: str) -> float:
        """Of the five repetitions."""
        return statistics.fmean(self.repeated[name])

    def truth(self, name: str) -> float:
        """The mean of the fresh trainings."""
        return statistics.fmean(self.fresh[name])


def members_of(seed: int, folder: Path, overrides: Sequence[str]) -> list[Member]:
    """The members of one search's front that are in the region that matters."""
    name = f"repetitions-{seed}"
    slimfront = str(Path(sys.executable).with_name("slimfront"))
    settings: list[str] = []
    for override in (f"search.seed={seed}", *overrides):
        settings += ["--set", override]
    _call([slimfront, "search", str(CONFIG), "--name", name, *settings], folder)
    _call([slimfront, "replicate", name, "--seeds", str(REPEATED + FRESH)], folder)
    config, result = read_result(name, str(folder / "runs"))
    return _members(config, result.ledger, result.front)


def _call(command: list[str], folder: Path) -> None:
    """Runs a command that may take long, and ends with what it said if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")


def _members(config: Config, ledger: Ledger, front: Sequence[MeasuredNetwork]) -> list[Member]:
    seeds = [config.search.seed_of_replica(place) for place in range(REPEATED + FRESH)]
    made = []
    for network in shown(ledger, front).members:
        if not all(seed in network.replicas for seed in seeds):
            continue  # a training of it failed
        values = {
            name: [network.replicas[seed][name] for seed in seeds] for name in (VALIDATION, TEST)
        }
        made.append(
            Member(
                network.measures | (network.tested or {}),
                {name: of_each[:REPEATED] for name, of_each in values.items()},
                {name: of_each[REPEATED:] for name, of_each in values.items()},
            )
        )
    return made


@dataclass(frozen=True)
class Bar:
    """An error bar: its middle, and how far it goes to either side."""

    middle: float
    half: float

    def covers(self, value: float) -> bool:
        """Whether a value lies within it; rounding does not decide."""
        return abs(value - self.middle) <= self.half + 1e-9


def searched(member: Member) -> Bar:
    """What a search shows of a member that was trained once."""
    return Bar(member.found[VALIDATION], member.found[f"{VALIDATION}_se"])


def of_trainings(member: Member) -> Bar:
    """What is shown after `replicate`: the mean and the standard deviation over trainings."""
    values = member.repeated[VALIDATION]
    return Bar(statistics.fmean(values), statistics.stdev(values))


def of_mean(member: Member) -> Bar:
    """Two standard errors of the mean over trainings."""
    values = member.repeated[VALIDATION]
    return Bar(statistics.fmean(values), 2 * statistics.stdev(values) / math.sqrt(len(values)))


def share(covered: Sequence[bool]) -> float:
    """The share of what is covered."""
    return sum(covered) / len(covered)


def repetitions(arguments: argparse.Namespace) -> Outcome:
    """How often error bars hold, and how much validation flatters, on the main job."""
    seeds = 1 if arguments.quick else arguments.seeds
    overrides = ["search.trials=8", "training.epochs=15"] if arguments.quick else []
    by_search = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            by_search.append(members_of(seed, Path(folder), overrides))
    members = [member for of_search in by_search for member in of_search]
    rows = [_row(seed, of_search) for seed, of_search in enumerate(by_search)]
    return Outcome(seeds, rows, _goals(members))


def _row(seed: int, members: list[Member]) -> dict[str, Any]:
    def over(value: Callable[[Member], float]) -> Any:
        return spread([100 * value(member) for member in members], 2)

    return {
        "search": f"seed {seed}",
        "members": len(members),
        "validation in the search, %": over(lambda one: one.found[VALIDATION]),
        f"mean of {REPEATED}, %": over(lambda one: one.repeated_mean(VALIDATION)),
        f"mean of {FRESH} fresh seeds, %": over(lambda one: one.truth(VALIDATION)),
        "their test accuracy, %": over(lambda one: one.truth(TEST)),
    }


def _goals(members: list[Member]) -> list[Goal]:
    flattering = {
        "of the search": [one.found[VALIDATION] - one.truth(VALIDATION) for one in members],
        "of the means": [one.repeated_mean(VALIDATION) - one.truth(VALIDATION) for one in members],
    }
    single = [of_trainings(one).covers(value) for one in members for value in one.fresh[VALIDATION]]
    means = [of_mean(one).covers(one.truth(VALIDATION)) for one in members]
    once = [searched(one).covers(one.truth(VALIDATION)) for one in members]
    before = 100 * statistics.fmean(flattering["of the search"])
    after = 100 * statistics.fmean(flattering["of the means"])
    return [
        at_most("points by which validation flatters, of the means", abs(after), abs(before)),
        at_least(
            f"share of fresh trainings within mean ± deviation ({_SINGLE:.2f} of normal values)",
            share(single),
            round(_SINGLE - _LESS, 2),
        ),
        at_least(
            f"share of their means within mean ± 2 standard errors ({_MEANS:.2f} of normal values)",
            share(means),
            round(_MEANS - _LESS, 2),
        ),
        at_least("share of their means within the search's own bar", share(once), 0.5),
    ]


if __name__ == "__main__":
    run("repetitions", repetitions, ("--seeds", {"type": int, "default": 3}))
