"""A whole search on one GPU: 64 trials of configs/cifar10-resnet20.yaml, shortened, against as many
plain trainings.

Several processes share the GPU, and each trains several trials at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Outcome, at_most, run
from benchmarks.gpu import BF16_LAST, CIFAR, Plain, Scale, seconds, training

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "cifar10-resnet20.yaml"


def changes(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """What is set otherwise than in the config."""
    gpu = int(device.type == "cuda")
    shortened: dict[str, Any] = {
        "training.epochs": arguments.epochs,
        "refit.epochs": 1,
        "penalties.block.ramp": 0,
        "penalties.node.ramp": 0,
        "search.trials": arguments.trials,
        "search.storage_path": folder / "runs",
        "tracking.uri": f"sqlite:///{folder}/slimfront.db",
        "one_shot.steps": 0,
        "resources.cpu": 4 if gpu else 1,
        "resources.gpu": gpu * arguments.share,
        "resources.pack": arguments.pack,
    }
    if gpu:
        shortened |= {f"training.{name}": value for name, value in BF16_LAST.items()}
    if CIFAR.exists() and not arguments.quick:
        return shortened | {"data.path": CIFAR, "data.limit": arguments.images}
    factory = (
        '{name: factory, factory: "benchmarks.gpu:images", args: {count: 240}, '
        "augment: {crop: 4, flip: true}}"
    )
    return shortened | {"data": factory, "model": "{name: resnet20, depth: 8, width: 4}"}


def search(arguments: argparse.Namespace, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole command, and what it says with `--json`."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [
            part
            for name, value in changes(arguments, device, Path(folder)).items()
            for part in ("--set", f"{name}={value}")
        ]
        command = [sys.executable, "-m", "slimfront", "search", str(CONFIG), "--json", *sets]
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the search ended with {done.returncode}")
        return time.perf_counter() - begun, json.loads(done.stdout)


def gpu_search(arguments: argparse.Namespace) -> Outcome:
    """Wall time of a search in packs over that of its trials as plain trainings, one after the
    other."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.quick or device.type == "cpu":
        arguments.quick, arguments.trials, arguments.epochs, arguments.pack = True, 4, 1, 2
    scale = Scale(
        4 if arguments.quick else 16, 128, 240 if arguments.quick else arguments.images, 1, (), ()
    )
    rivals = {"float32": Plain(training(device, scale))}
    if device.type == "cuda":
        rivals["bf16, channels last"] = Plain(
            training(device, scale), bf16=True, channels_last=True
        )
    plain = {name: min(seconds(rival, device) for _ in range(3)) for name, rival in rivals.items()}
    del rivals
    wall, told = search(arguments, device)
    trainings = {name: arguments.trials * arguments.epochs * each for name, each in plain.items()}
    front = told["front"]
    best = max(member["val_accuracy"] for member in front)
    what = f"search of {arguments.trials} trials of {arguments.epochs} epochs, the whole command"
    rows = [{"what": what, "seconds": f"{wall:.0f}"}]
    for name, total in trainings.items():
        rows.append(
            {
                "what": f"as many plain trainings, {name}, one after the other",
                "seconds": f"{total:.0f}",
            }
        )
    rows.append(
        {
            "what": f"members of the front (not seconds), of which the best has {best:.4f}",
            "seconds": str(len(front)),
        }
    )
    for member in front:
        print(json.dumps(member), file=sys.stderr)
    goals = [
        at_most(
            "wall time over that of plain trainings in float32", wall / trainings["float32"], 1.0
        )
    ]
    return Outcome(1, rows, goals if device.type == "cuda" else [])


if __name__ == "__main__":
    run(
        "gpu_search",
        gpu_search,
        ("--trials", {"type": int, "default": 64}),
        ("--epochs", {"type": int, "default": 8}),
        ("--images", {"type": int, "default": 20_000}),
        ("--pack", {"type": int, "default": 4, "help": "trials in one process"}),
        ("--share", {"type": float, "default": 0.25, "help": "of the GPU, of each process"}),
    )
