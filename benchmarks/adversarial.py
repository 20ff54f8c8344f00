"""Networks drawn at random to mislead compaction: none may come out wrong or larger, or keep zero
units without a word."""

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.common import Goal, Outcome, at_most, run
from tests.trainables.compaction.adversarial import Ended, draw, examine

NETWORKS, QUICK, QUICK_S, PROCESSES = 10_000, 200, 45.0, 2
SECONDS = 60.0
"""A network that takes longer does not end."""
MEMORY = 6 * 2**30
"""Bytes that a process may have: an analysis that grows without end raises an error, and does not
take the machine's memory."""
_PROBLEMS = {
    "fault": "that raised anything but one sentence, or did not end",
    "wrong": "with other outputs",
    "larger": "that came out larger",
    "unsaid": "that keep zero units without a warning",
    "undropped": "that lost dropout without a warning",
}


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """Networks that are drawn at random made compact, and compared in float64 on inputs of other
    batch sizes."""
    count = QUICK if arguments.quick else arguments.networks
    seeds = list(range(arguments.first, arguments.first + count))
    until = time.monotonic() + (
        min(arguments.seconds, QUICK_S) if arguments.quick else arguments.seconds
    )
    ends = _kept(arguments.keep, seeds)
    done = {end.seed for end in ends}
    for end in examined([seed for seed in seeds if seed not in done], until):
        ends.append(end)
        if arguments.keep is not None:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(asdict(end)) + "\n")
        if end.problem:
            print(f"number {end.seed}, {end.kinds}: {end.problem}", file=sys.stderr, flush=True)
    kinds = sorted({kind for end in ends for kind in end.kinds})
    rows = [_row(kind, [end for end in ends if kind in end.kinds]) for kind in kinds]
    return Outcome(1, [*rows, _row("all", ends)], _goals(ends))


def _kept(file: Path | None, seeds: list[int]) -> list[Ended]:
    """What became of these networks in earlier runs."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    kept = [json.loads(line) for line in lines]
    ends = {each["seed"]: Ended(**{**each, "kinds": tuple(each["kinds"])}) for each in kept}
    return [ends[seed] for seed in seeds if seed in ends]


class _Worker:
    """A process that examines one network after another, and can be killed."""

    def __init__(self, examine: Callable[[int], Ended]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, examine), daemon=True)
        self.process.start()
        theirs.close()
        self.seed: int | None = None
        self.deadline = math.inf
        """It is ready once it has said so: importing takes a while."""

    def give(self, seed: int, seconds: float) -> None:
        self.seed, self.deadline = seed, time.monotonic() + seconds
        self.connection.send(seed)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def examined(
    seeds: list[int],
    until: float = math.inf,
    seconds: float = SECONDS,
    examine: Callable[[int], Ended] = examine,
) -> Iterator[Ended]:
    """What becomes of the networks of these numbers, as it becomes known, in several processes.

    A network that takes longer than `seconds`, or whose process dies, is a fault. At the time
    `until` (of the monotonic clock) all processes are ended.
    """
    waiting, workers = list(reversed(seeds)), []
    try:
        workers = [_Worker(examine) for _ in seeds[:PROCESSES]]
        while workers and time.monotonic() < until:
            connections = [worker.connection for worker in workers]
            ready = multiprocessing.connection.wait(connections, timeout=0.5)
            for worker in list(workers):
                problem = ""
                if worker.connection in ready:
                    try:
                        end = worker.connection.recv()
                        if end is not None:
                            yield end
                    except EOFError:
                        worker.process.join()
                        problem = f"its process died ({worker.process.exitcode})"
                elif time.monotonic() > worker.deadline:
                    problem = f"did not end within {seconds:g} s"
                else:
                    continue
                if problem:
                    worker.end()
                    workers.remove(worker)
                    if worker.seed is None:
                        raise RuntimeError(f"no network was looked at: {problem}")
                    kinds = draw(worker.seed)[0]
                    yield Ended(worker.seed, kinds, "fault", f"fault: {problem}")
                    workers += [_Worker(examine)] if waiting else []
                elif waiting:
                    worker.give(waiting.pop(), seconds)
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _work(connection: Connection, examine: Callable[[int], Ended]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    logging.getLogger("slimfront.trainables").propagate = False
    with contextlib.suppress(EOFError, OSError):  # which reading and writing raise once nobody asks
        connection.send(None)
        while True:
            connection.send(examine(connection.recv()))


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
        (
            "--keep",
            {
                "type": Path,
                "default": None,
                "help": "a file for what became of each; those in it are not looked at again",
            },
        ),
    )
