"""What all benchmarks share: their command line, their JSON, and their tables."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

OF_THE_ZOO = ("torchvision", "timm", "transformers", "segmentation-models-pytorch")
"""Libraries that `make zoo` alone installs."""


@dataclass(frozen=True)
class Goal:
    """What a benchmark should reach, and whether it did."""

    name: str
    value: float
    goal: str
    met: bool


@dataclass(frozen=True)
class Outcome:
    """The result of a benchmark: rows of a table, all with the same keys, and its goals."""

    seeds: int
    rows: list[dict[str, Any]]
    goals: list[Goal]


def at_least(name: str, value: float, goal: float) -> Goal:
    """A goal that is met from `goal` upwards."""
    return Goal(name, value, f">= {goal:g}", value >= goal)


def at_most(name: str, value: float, goal: float) -> Goal:
    """A goal that is met from `goal` downwards."""
    return Goal(name, value, f"<= {goal:g}", value <= goal)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the deviation is None for one seed. `digits` are
    those that people see."""

    mean: float
    std: float | None
    digits: int

    def __str__(self) -> str:
        shown = f"{self.mean:,.{self.digits}f}"
        return shown if self.std is None else f"{shown} ± {self.std:,.{self.digits}f}"


def spread(values: Sequence[float], digits: int = 3) -> Spread:
    """The spread of one value per seed."""
    return Spread(
        statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, digits
    )


class Kept:
    """Results by name in a file, so that a run that is cut off can be called again and goes on;
    without a file they are kept as long as the process."""

    def __init__(self, file: str | None) -> None:
        self.file = None if file is None else Path(file)
        self.results: dict[str, Any] = {}
        if self.file is not None and self.file.is_file():
            for line in self.file.read_text().splitlines():
                row = json.loads(line)
                self.results[row["name"]] = row["result"]

    def put(self, name: str, result: Any) -> None:
        """Keeps a result, plain data, and says it."""
        self.results[name] = result
        row = json.dumps({"name": name, "result": result})
        print(row, file=sys.stderr, flush=True)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as kept:
                kept.write(f"{row}\n")


KEEP: tuple[str, dict[str, Any]] = (
    "--keep",
    {"help": "a file of results, which a run that is called again goes on from"},
)
"""The option that names the file of `Kept`."""


def device() -> str:
    """The GPU's name, or the CPU architecture with the number of cores."""
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )


def versions() -> dict[str, str]:
    """What is installed of the libraries that results depend on, by name."""
    found = {}
    for name in ("torch", "ray", "optuna", "mlflow", *OF_THE_ZOO):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def chromium() -> str | None:
    """The path of a Chromium for what is done in a browser; None if there is none (`make chromium`
    installs it)."""
    return (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


def as_markdown(outcome: Outcome) -> str:
    """The rows and goals as Markdown tables, with the device, the versions and the seed count above
    them."""
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [f"{outcome.seeds} seed{'s' * (outcome.seeds != 1)}; {device()}; {installed}.", ""]
    lines += _table(outcome.rows)
    if outcome.goals:
        goals = [
            {
                "goal": g.name,
                "wanted": g.goal,
                "seen": f"{g.value:.4g}",
                "met": "yes" if g.met else "no",
            }
            for g in outcome.goals
        ]
        lines += ["", *_table(goals)]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = list(rows[0])
    lines = [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
    return lines + [f"| {' | '.join(str(row[key]) for key in keys)} |" for row in rows]


def run(
    name: str,
    benchmark: Callable[[argparse.Namespace], Outcome],
    *options: tuple[str, dict[str, Any]],
) -> None:
    """The command line of a benchmark: `--quick`, `--json`, and its own options as for
    `add_argument`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=benchmark.__doc__
    )
    parser.add_argument(
        "--quick", action="store_true", help="the same code on less work, within 60 s on two cores"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    for flag, settings in options:
        parser.add_argument(flag, **settings)
    arguments = parser.parse_args()
    outcome = benchmark(arguments)
    print(as_markdown(outcome))
    if arguments.json:
        print(
            json.dumps(
                {"benchmark": name, "device": device(), "versions": versions(), **asdict(outcome)}
            )
        )
