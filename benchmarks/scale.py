"""Two thousand trials that do nothing but report: what a trial costs the driver, early and late, in
time and in memory."""

import argparse
import gc
import logging
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from benchmarks.common import Outcome, at_most, run
from slimfront.search.config.loading import load
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
MEASURES = {
    "val_accuracy": 0.5,
    "params": 100,
    "nonzero_params": 50,
    "layers": 2,
    "flops": 200,
    "bytes": 400,
}


class Nothing(tune.Trainable):
    """Reports three times, each a little better or worse by its values, and ends."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """As the real trainable asks for."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the values."""
        self.number, self.steps = config["number"] or 0, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial's."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One report."""
        self.steps += 1
        measures = MEASURES | {
            "val_accuracy": (self.number * 7919 % 1000) / 1000,
            "nonzero_params": self.number * 104729 % 5000 + 1,
        }
        done = self.steps == 3
        history = [{"epoch": self.steps, "train_loss": 1.0}]
        return measures | {"history": history, "epoch": self.steps, "finished": done, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing but a file."""
        Path(checkpoint_dir, "nothing").touch()

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:
        """Nothing."""


class Clock(Progress):
    """The driver's CPU seconds and memory at the end of each trial."""

    def __init__(self) -> None:
        self.driver = psutil.Process()
        self.ends: list[tuple[float, float, int]] = []

    def update(self, ledger: Ledger) -> None:
        """Takes the time when another trial has ended."""
        done = sum(trial.status != "running" for trial in ledger.trials)
        if done > len(self.ends):
            times = self.driver.cpu_times()
            self.ends.append(
                (time.monotonic(), times.user + times.system, self.driver.memory_info().rss)
            )


class Allocations(Progress):
    """Snapshots of what Python has allocated, after a third of the trials and at the end."""

    def __init__(self, trials: int) -> None:
        self.at = [trials // 3, trials]
        self.taken: list[tuple[int, tracemalloc.Snapshot]] = []

    def update(self, ledger: Ledger) -> None:
        """Takes one when it is time."""
        done = sum(trial.status != "running" for trial in ledger.trials)
        if self.at and done >= self.at[0]:
            self.at.pop(0)
            gc.collect()
            self.taken.append((done, tracemalloc.take_snapshot()))

    def by_package(self) -> dict[str, float]:
        """kB per trial that each package's code allocated between the two and still held, the
        largest first."""
        (first, before), (last, after) = self.taken
        grown: Counter[str] = Counter()
        for change in after.compare_to(before, "filename"):
            parts = Path(change.traceback[0].filename).parts
            inside = (
                parts[parts.index("site-packages") + 1]
                if "site-packages" in parts
                else "/".join(parts[-2:-1]) or parts[0]
            )
            grown[inside] += change.size_diff
        return {package: size / (last - first) / 1e3 for package, size in grown.most_common(6)}


def search_of_nothing(trials: int, progress: Clock | Allocations) -> None:
    """A search whose trials only report."""
    with tempfile.TemporaryDirectory() as directory:
        wanted = [
            f"search.trials={trials}",
            "search.sampler=random",
            "resources.cpu=0.125",
            f"search.storage_path={directory}",
        ]
        config = load(
            CONFIG,
            [*wanted, f"tracking.uri=sqlite:///{directory}/mlflow.db", "search.concurrency=16"],
        )
        run_search(config, progress, name="scale", trainable=Nothing)


def scale(arguments: argparse.Namespace) -> Outcome:
    """Driver seconds and memory per trial of a long search."""
    trials, window, traced = (45, 15, 30) if arguments.quick else (arguments.trials, 200, 300)
    logging.getLogger().setLevel(logging.ERROR)
    start_local_ray()
    clock = Clock()
    search_of_nothing(trials, clock)
    rows = []
    for name, part in (("first", clock.ends[: window + 1]), ("last", clock.ends[-window - 1 :])):
        count = len(part) - 1
        rows.append(
            {
                "trials": f"{name} {count} of {trials}",
                "wall seconds per trial": f"{(part[-1][0] - part[0][0]) / count:.4f}",
                "driver CPU seconds per trial": f"{(part[-1][1] - part[0][1]) / count:.4f}",
                "driver memory, MB": f"{part[-1][2] / 1e6:.0f}",
                "growth per trial, kB": f"{(part[-1][2] - part[0][2]) / count / 1e3:.1f}",
            }
        )
    ratio = float(rows[1]["wall seconds per trial"]) / float(rows[0]["wall seconds per trial"])
    allocations = Allocations(traced)
    tracemalloc.start()
    search_of_nothing(traced, allocations)
    ray.shutdown()
    held = ", ".join(f"{package} {size:.1f}" for package, size in allocations.by_package().items())
    what = f"allocated by Python code and held, kB per trial, in a search of {traced}: {held}"
    rows.append(dict.fromkeys(rows[0], "") | {"trials": what})
    return Outcome(1, rows, [at_most("seconds per trial, last over first", ratio, 1.5)])


if __name__ == "__main__":
    run("scale", scale, ("--trials", {"type": int, "default": 2000}))
