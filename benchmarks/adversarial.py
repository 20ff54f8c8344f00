"""Networks drawn at random to mislead compaction: none may come out wrong or larger, or keep zero
units without a word."""

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter

from benchmarks.common import Goal, Outcome, at_most, run
from tests.trainables.compaction.adversarial import Ended, examine

NETWORKS, QUICK, PROCESSES = 10_000, 200, 2
_PROBLEMS = {
    "fault": "that raised anything but one sentence",
    "wrong": "with other outputs",
    "larger": "that came out larger",
    "unsaid": "that keep zero units without a warning",
    "undropped": "that lost dropout without a warning",
}


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """Networks that are drawn at random made compact, and compared in float64 on inputs of other
    batch sizes."""
    count = QUICK if arguments.quick else arguments.networks
    until = time.monotonic() + arguments.seconds
    ends: list[Ended] = []
    with multiprocessing.get_context("spawn").Pool(PROCESSES, _alone) as pool:
        for end in pool.imap_unordered(
            examine, range(arguments.first, arguments.first + count), chunksize=4
        ):
            ends.append(end)
            if end.problem:
                print(f"number {end.seed}, {end.kinds}: {end.problem}", file=sys.stderr)
            if time.monotonic() > until:
                pool.terminate()
                break
    kinds = sorted({kind for end in ends for kind in end.kinds})
    rows = [_row(kind, [end for end in ends if kind in end.kinds]) for kind in kinds]
    return Outcome(1, [*rows, _row("all", ends)], _goals(ends))


def _alone() -> None:
    import logging

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("slimfront.trainables").propagate = False


def _row(kind: str, ends: list[Ended]) -> dict[str, object]:
    problems = Counter(_problem(end) for end in ends)
    return {
        "block": kind,
        "networks": f"{len(ends):,}",
        "compacted": f"{sum(end.what == 'compacted' for end in ends):,}",
        "smaller": f"{sum(end.smaller for end in ends):,}",
        "refused": sum(end.what == "refused" for end in ends),
        **{name: problems[name] for name in _PROBLEMS},
    }


def _problem(end: Ended) -> str:
    return end.problem.partition(":")[0] if end.what != "fault" else "fault"


def _goals(ends: list[Ended]) -> list[Goal]:
    problems = Counter(_problem(end) for end in ends)
    return [at_most(f"networks {said}", problems[name], 0) for name, said in _PROBLEMS.items()]


if __name__ == "__main__":
    run(
        "adversarial",
        benchmark,
        ("--networks", {"type": int, "default": NETWORKS, "help": "so many"}),
        (
            "--first",
            {
                "type": int,
                "default": 0,
                "help": "the number of the first, as messages about failures say it",
            },
        ),
        (
            "--seconds",
            {
                "type": float,
                "default": float("inf"),
                "help": "end after so long, with those that were looked at",
            },
        ),
    )
