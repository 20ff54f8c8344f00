"""The main job as a user runs it: `slimfront search configs/digits.yaml`, over several seeds."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Outcome, at_least, at_most, run, spread

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
SMALL = 0.10


def search(seed: int, directory: Path, overrides: list[str]) -> tuple[dict[str, Any], float, float]:
    """Runs one search in a process of its own: its JSON, the command's seconds, and the driver's
    peak memory in GB."""
    command = [str(Path(sys.executable).with_name("slimfront")), "search", str(CONFIG), "--json"]
    for override in [f"search.seed={seed}", *overrides]:
        command += ["--set", override]
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        driver, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, driver.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the search of seed {seed} ended with exit code {process.returncode}")
    return json.loads(out), time.monotonic() - started, peak / 1e9


def most_accurate_small(result: dict[str, Any]) -> dict[str, Any]:
    """The most accurate front member (on validation) with at most a tenth of the dense network's
    parameters."""
    small = [m for m in result["front"] if m["nonzero_params"] <= SMALL * result["dense"]["params"]]
    return max(small, key=lambda m: m["val_accuracy"])


def main_job(arguments: argparse.Namespace) -> Outcome:
    """Wall time, memory and front of the main job."""
    seeds = 1 if arguments.quick else arguments.seeds
    overrides = ["search.trials=8", "training.epochs=15"] if arguments.quick else []
    results, seconds, memory, small = [], [], [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            result, wall, peak = search(seed, Path(name), overrides)
            if arguments.picture and seed == 0:
                shutil.copy(
                    next(Path(name).glob("runs/artifacts/*/artifacts/front.png")), arguments.picture
                )
        results.append(result)
        seconds.append(wall)
        memory.append(peak)
        small.append(most_accurate_small(result))
    dense = [result["dense"] for result in results]
    rows = [
        {
            "network": "dense",
            "validation accuracy": spread([d["val_accuracy"] for d in dense], 4),
            "test accuracy": spread([d["test_accuracy"] for d in dense], 4),
            "non-zero parameters": spread([d["nonzero_params"] for d in dense], 0),
            "weight layers": spread([d["layers"] for d in dense], 1),
        },
        {
            "network": f"front, at most {SMALL:.0%} of dense",
            "validation accuracy": spread([m["val_accuracy"] for m in small], 4),
            "test accuracy": spread([m["test_accuracy"] for m in small], 4),
            "non-zero parameters": spread([m["nonzero_params"] for m in small], 0),
            "weight layers": spread([m["layers"] for m in small], 1),
        },
    ]
    goals = [
        at_most(
            "seconds of the search (slowest seed)", max(r["wall_seconds"] for r in results), 90
        ),
        at_most("seconds of the whole command (slowest seed)", max(seconds), 120),
        at_least("points on the front (smallest)", min(len(r["front"]) for r in results), 5),
        at_least(
            "validation accuracy at 10 % of dense (lowest)",
            min(m["val_accuracy"] for m in small),
            0.95,
        ),
        at_most("peak memory of the driver, GB (largest)", max(memory), 1.5),
    ]
    return Outcome(seeds, rows, goals)


if __name__ == "__main__":
    run(
        "main_job",
        main_job,
        ("--seeds", {"type": int, "default": 5}),
        ("--picture", {"type": Path, "help": "where to put the front of seed 0 as PNG"}),
    )
