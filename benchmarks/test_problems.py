"""ZDT1, ZDT2 and DTLZ2 with a simulated fidelity: our early stopping and sampler against a plain
one, without any training."""

import argparse
import heapq
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from benchmarks.common import Goal, Outcome, at_most, run
from benchmarks.curves import THIRD, Curve, compare, shares
from slimfront.search.config.samplers import build_sampler
from slimfront.search.engine.scheduler import MultiObjectiveASHA
from slimfront.search.record.front.pareto import hypervolume

EPOCHS, WORKERS = 27, 4


def zdt1(x: NDArray[np.float64]) -> list[float]:
    """Zitzler, Deb, Thiele 2000, eq. 7: a convex front."""
    g = 1 + 9 * float(x[1:].mean())
    return [float(x[0]), g * (1 - math.sqrt(x[0] / g))]


def zdt2(x: NDArray[np.float64]) -> list[float]:
    """The same paper, eq. 8: a concave front."""
    g = 1 + 9 * float(x[1:].mean())
    return [float(x[0]), g * (1 - (x[0] / g) ** 2)]


def dtlz2(x: NDArray[np.float64]) -> list[float]:
    """Deb et al. 2002, eq. 9, three objectives: the front is an eighth of the unit sphere."""
    g = 1 + float(((x[2:] - 0.5) ** 2).sum())
    a, b = math.pi / 2 * x[0], math.pi / 2 * x[1]
    return [g * math.cos(a) * math.cos(b), g * math.cos(a) * math.sin(b), g * math.sin(a)]


@dataclass(frozen=True)
class Problem:
    """Objectives on the unit cube, all minimised, and the reference point of their hypervolume."""

    objectives: Callable[[NDArray[np.float64]], list[float]]
    variables: int
    reference: tuple[float, ...]

    def at_epoch(self, x: NDArray[np.float64], epoch: int) -> list[float]:
        """A learning curve: what is still to learn falls as a power of the epoch, and is gone at
        the last.

        Its exponent, 0.5 to 1.5, depends on x, so that those who lead early are not always those
        who lead at the end.
        """
        exponent = 1 + 0.5 * math.sin(37 * float(x.sum()))
        return [value + epoch**-exponent - EPOCHS**-exponent for value in self.objectives(x)]


PROBLEMS = {
    "ZDT1": Problem(zdt1, 10, (1.1, 6.0)),
    "ZDT2": Problem(zdt2, 10, (1.1, 6.0)),
    "DTLZ2": Problem(dtlz2, 10, (2.0, 2.0, 2.0)),
}


@dataclass(frozen=True)
class Variant:
    """One way to search; `told`: whether the sampler hears of trials that were stopped early."""

    sampler: Callable[[int], BaseSampler] = lambda seed: build_sampler(
        "tpe", seed, {"n_startup_trials": 20}
    )
    stopping: bool = True
    told: bool = True


OURS, ASSEMBLED = "ours", "TPE as OptunaSearch has it, no stopping"
VARIANTS: dict[str, Variant] = {
    ASSEMBLED: Variant(lambda seed: TPESampler(seed=seed), stopping=False),
    OURS: Variant(),
    "ours, stopped trials not told": Variant(told=False),
    "ours with multivariate tpe": Variant(
        lambda seed: build_sampler("tpe", seed, {"n_startup_trials": 20, "multivariate": True})
    ),
    "ours with random": Variant(lambda seed: RandomSampler(seed=seed)),
    "ours without early stopping": Variant(lambda seed: build_sampler("tpe", seed), stopping=False),
    "random, no stopping": Variant(lambda seed: RandomSampler(seed=seed), stopping=False),
}


def search(problem: Problem, variant: Variant, seed: int, budget: int) -> Curve:
    """One search by several workers at once, an epoch after the other, until the budget of epochs
    is spent.

    With stopping, the networks of all epochs count, as in a search of ours; without, those of the
    last.
    """
    stopping = variant.stopping
    study = optuna.create_study(
        directions=["minimize"] * len(problem.reference), sampler=variant.sampler(seed)
    )
    names = [str(i) for i in range(len(problem.reference))]
    scheduler = MultiObjectiveASHA(
        dict.fromkeys(names, "min"), time_attr="epoch", grace=1, max_time=EPOCHS
    )
    space: dict[str, Any] = {f"x{i}": FloatDistribution(0, 1) for i in range(problem.variables)}
    reference = np.array(problem.reference)
    curve, found, spent = Curve(), np.empty((0, len(reference))), 0
    queue: list[tuple[float, int, Any, int]] = []

    def begin(time: float) -> None:
        trial = study.ask(space)
        scheduler.on_trial_add(None, name(trial))
        heapq.heappush(queue, (time + 1, trial.number, trial, 1))

    for worker in range(WORKERS):
        begin(worker / WORKERS)
    while spent < budget:
        time, number, trial, epoch = heapq.heappop(queue)
        spent += 1
        values = problem.at_epoch(np.array(list(trial.params.values())), epoch)
        last, stopped = epoch == EPOCHS, False
        if stopping and not last:
            report = {"epoch": epoch, **dict(zip(names, values, strict=True))}
            last = stopped = (
                scheduler.on_trial_result(None, name(trial), report) == TrialScheduler.STOP
            )
        if stopping or last:
            found = np.vstack([found, values])
            curve.append((spent, hypervolume(found, reference)))
        if last:
            if stopped and not variant.told:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, values)
            begin(time)
        else:
            heapq.heappush(queue, (time + 1, number, trial, epoch + 1))
    return curve


def name(trial: optuna.Trial) -> Any:
    """What the scheduler wants to know of a trial."""
    return SimpleNamespace(trial_id=str(trial.number), config={})


def test_problems(arguments: argparse.Namespace) -> Outcome:
    """Hypervolume over simulated epochs, at equal budgets."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    seeds, trials = (1, 12) if arguments.quick else (arguments.seeds, 60)
    budget = trials * EPOCHS
    rows, goals = [], list[Goal]()
    for problem_name, problem in PROBLEMS.items():
        curves = {
            title: [search(problem, variant, seed, budget) for seed in range(seeds)]
            for title, variant in VARIANTS.items()
        }
        rows += [{"problem": problem_name, **row} for row in compare(curves, ASSEMBLED, budget)]
        share = statistics.median(shares(curves[OURS], curves[ASSEMBLED], budget))
        goals.append(
            at_most(f"{problem_name}: share of the epochs that ours needs (median)", share, THIRD)
        )
    return Outcome(seeds, rows, goals)


if __name__ == "__main__":
    run("test_problems", test_problems, ("--seeds", {"type": int, "default": 5}))
