"""What MLflow costs a search: time and calls per trial, ours and Ray's own callback, and how long a
large search's page takes."""

import argparse
import logging
import os
import re
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from mlflow import MlflowClient
from mlflow.entities import Metric
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback

from benchmarks.common import Outcome, at_most, chromium, run
from benchmarks.scale import CONFIG, MEASURES, Nothing
from slimfront.search.config.loading import load
from slimfront.search.engine import runner
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.server import server_command, server_environment

EPOCHS, METRICS = 20, 12
AT_ONCE = 4
SHORT_S, LONG_S = 0.02, 0.1
"""Seconds of an epoch: of the digits perceptron, and of a network that is still small."""


class Trains(Nothing):
    """Reports twelve metrics of each epoch, five epochs at a time."""

    epoch_s = SHORT_S

    def step(self) -> dict[str, Any]:
        """One report."""
        history = []
        for _ in range(5):
            time.sleep(self.epoch_s)
            self.steps += 1
            history.append({"epoch": self.steps} | metrics_of(self.steps))
        measures = MEASURES | {"val_accuracy": (self.number * 7919 % 1000) / 1000}
        done = self.steps >= EPOCHS
        return measures | {"history": history, "epoch": self.steps, "finished": done, "done": done}


def metrics_of(epoch: int) -> dict[str, float]:
    """Twelve numbers."""
    return {f"metric_{n}": n / epoch for n in range(METRICS)}


def trains(_values: dict[str, Any]) -> None:
    """The same as a function for Ray, which reports every epoch, as its documentation does."""
    for epoch in range(1, EPOCHS + 1):
        time.sleep(SHORT_S)
        tune.report(metrics_of(epoch))


class NoRecorder:
    """Takes everything and writes nothing."""

    run_ids: dict[str, str] = {}  # noqa: RUF012 (never changed)

    def __init__(self, *_: Any) -> None: ...

    def take(self, event: Any) -> None:
        """Nothing."""

    def close(self) -> bool:
        """Nothing."""
        return True


@dataclass
class Server:
    """A running `mlflow server`."""

    url: str
    said: Path

    def calls(self) -> int:
        """How many requests it has answered."""
        return len(re.findall(r'"(?:GET|POST|PUT|PATCH|DELETE) ', self.said.read_text()))


@contextmanager
def local_server(directory: Path) -> Iterator[Server]:
    """A server on SQLite, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*server_command(port), "--artifacts-destination", str(directory / "artifacts")]
    environment = server_environment(f"sqlite:///{directory}/server.db")
    said = directory / "server.txt"
    with (
        said.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}", said)
        finally:
            process.terminate()


class TrainsLonger(Trains):
    """The same with longer epochs."""

    epoch_s = LONG_S


def ours(trials: int, directory: Path, uri: str, trainable: type[Trains]) -> float:
    """Seconds of a search of ours."""
    wanted = [
        f"search.trials={trials}",
        "search.sampler=random",
        "resources.cpu=0.5",
        f"search.storage_path={directory}/runs",
    ]
    config = load(
        CONFIG,
        [*wanted, f"tracking.uri={uri}", f"search.concurrency={AT_ONCE}", "one_shot.steps=0"],
    )
    begun = time.monotonic()
    runner.run_search(config, trainable=trainable)
    return time.monotonic() - begun


def rays(trials: int, directory: Path, callbacks: list[tune.Callback]) -> float:
    """Seconds of the same with Ray alone."""
    begun = time.monotonic()
    tune.Tuner(
        tune.with_resources(trains, {"cpu": 0.5}),
        param_space={"value": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=AT_ONCE),
        run_config=tune.RunConfig(
            storage_path=str(directory / "ray"), verbose=0, callbacks=callbacks
        ),
    ).fit()
    return time.monotonic() - begun


def page_seconds(url: str, children: int) -> tuple[float, float]:
    """Median seconds until a parent's page shows its description, with so many children and with
    one."""
    from playwright.sync_api import sync_playwright

    client = MlflowClient(url)
    seconds = []
    for count in (children, 1):
        experiment = client.create_experiment(
            f"page-{count}", tags={"mlflow.experimentKind": "custom_model_development"}
        )
        parent = client.create_run(
            experiment, run_name="parent", tags={"mlflow.note.content": "The story."}
        ).info.run_id
        for number in range(count):
            child = client.create_run(
                experiment, run_name=f"trial-{number}", tags={"mlflow.parentRunId": parent}
            ).info.run_id
            client.log_batch(child, metrics=[Metric("nonzero_params", number, 1, 1)])
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            taken = []
            for _ in range(3):
                page = browser.new_context().new_page()
                begun = time.monotonic()
                page.goto(
                    f"{url}/#/experiments/{experiment}/runs/{parent}?workflowType=machine_learning"
                )
                page.get_by_text("The story.").wait_for(timeout=120_000)
                taken.append(time.monotonic() - begun)
            seconds.append(statistics.median(taken))
            browser.close()
    return seconds[0], seconds[1]


@dataclass
class Contender:
    """A search that is timed with tracking and without."""

    name: str
    trials: int
    rounds: int
    tracked: Callable[[int], float]
    plain: Callable[[int], float]

    def measure(self, server: Server) -> tuple[float, dict[str, str]]:
        """The median ratio, and the row of the table; who is first changes from round to round."""
        found, calls = [], 0
        for turn in range(self.rounds):
            without = self.plain(self.trials) if turn % 2 else 0.0
            before = server.calls()
            with_it = self.tracked(self.trials)
            calls = server.calls() - before
            found.append((with_it, without or self.plain(self.trials)))
        ratios = [a / b for a, b in found]
        return statistics.median(ratios), {
            "search": f"{self.name}, {self.trials} trials",
            "seconds": f"{statistics.median(a for a, _ in found):.1f}",
            "seconds without tracking": f"{statistics.median(b for _, b in found):.1f}",
            "ratio: median (range)": (
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            ),
            "rounds": str(self.rounds),
            "calls per trial": f"{calls / self.trials:.1f}",
        }


def tracking(arguments: argparse.Namespace) -> Outcome:
    """Ratios of search time with tracking to search time without, each taken next to the other."""
    trials, of_rays, rounds, children = (8, 2, 1, 50) if arguments.quick else (200, 50, 3, 1000)
    logging.getLogger().setLevel(logging.ERROR)
    start_local_ray()
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        local_server(Path(folder)) as server,
    ):
        directory = Path(folder)

        def search(trainable: type[Trains], recorder: type) -> Callable[[int], float]:
            def timed(trials: int) -> float:
                with patch.object(runner, "Recorder", recorder):
                    return ours(trials, directory, server.url, trainable)

            return timed

        def callback() -> MLflowLoggerCallback:
            return MLflowLoggerCallback(tracking_uri=server.url, experiment_name="ray")

        contenders = [
            Contender(
                f"ours, epochs of {kind.epoch_s} s",
                trials,
                rounds,
                search(kind, Recorder),
                search(kind, NoRecorder),
            )
            for kind in (Trains, TrainsLonger)
        ]
        rays_own = (
            lambda trials: rays(trials, directory, [callback()]),
            lambda trials: rays(trials, directory, []),
        )
        contenders.append(
            Contender(f"Ray's MLflowLoggerCallback, epochs of {SHORT_S} s", of_rays, 1, *rays_own)
        )
        search(Trains, Recorder)(4)  # what only the first search of a process pays
        measured = [contender.measure(server) for contender in contenders]
        rows = [row for _, row in measured]
        large, small = page_seconds(server.url, children)
        page = (
            f"the page of a run with {children:,} children: {large:.1f} s; with one: {small:.1f} s"
        )
        rows.append(dict.fromkeys(rows[0], "") | {"search": page})
    ray.shutdown()
    goals = [
        at_most(f"time with tracking over without, {c.name}", m[0], 1.05)
        for c, m in zip(contenders[:2], measured, strict=False)
    ]
    return Outcome(rounds, rows, goals)


if __name__ == "__main__":
    run("tracking", tracking)
