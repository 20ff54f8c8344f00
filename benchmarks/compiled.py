"""What `torch.compile` costs and brings in training steps: time of a step compiled over that as it
is, and when that pays back.

`training.compile` is `true` in one of two trainings that take turns, each in a step of a full batch
with all that belongs to it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.common import Goal, Outcome, at_least, run
from slimfront import Candidate
from slimfront.trainables.data.base import Split
from slimfront.trainables.training.loop import Training

IMAGES = {"name": "factory", "factory": "benchmarks.gpu:images", "args": {"count": 1000}}
NETWORKS: dict[str, dict[str, Any]] = {
    "MLP 4×64, digits, batch 64": {"model": {"name": "mlp"}, "data": "digits"},
    "LeNet, batch 64": {"model": {"name": "lenet"}, "data": IMAGES},
    "VGG-11, width 16, batch 64": {
        "model": {"name": "vgg", "depth": 11, "width": 16},
        "data": IMAGES,
    },
    "ResNet-20, width 8, batch 64": {"model": {"name": "resnet20", "width": 8}, "data": IMAGES},
    "ResNet-20, batch 128": {
        "model": {"name": "resnet20"},
        "data": IMAGES,
        "training": {"batch_size": 128},
    },
}
QUICK = ("MLP 4×64, digits, batch 64",)
GOAL = 1.2


def training(tree: Mapping[str, Any], device: torch.device, *, compiled: bool) -> Training:
    """One that is ready for steps; with `compiled`, the first of them compiles."""
    options = (
        {"epochs": 10**6, "batch_size": 64, "seed": 0}
        | tree.get("training", {})
        | {"compile": compiled}
    )
    made = Training(Candidate.model_validate({**tree, "training": options}), device)
    made.model.train()
    made.losses = made.shared_losses()
    return made


def seconds(made: Training) -> float:
    """Of a step."""
    train, size = made.data.train, made.options.batch_size
    batch = Split(train.inputs[:size], train.targets[:size])
    begun = time.perf_counter()
    made.train_batch(batch, 1.0)
    if made.device.type == "cuda":
        torch.cuda.synchronize(made.device)
    return time.perf_counter() - begun


def first_step(name: str, cache: str) -> float:
    """Seconds of the first compiled step of a new process, which keeps its code in `cache`."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--first", name]
    shown = subprocess.run(
        command,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return float(shown.splitlines()[-1])


def compiled(arguments: argparse.Namespace) -> Outcome:
    """Training steps with torch.compile and without, and the time to compile."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.first:
        print(seconds(training(NETWORKS[arguments.first], device, compiled=True)))
        raise SystemExit
    rows, goals = [], list[Goal]()
    for name in QUICK if arguments.quick else NETWORKS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            cold, warm = first_step(name, cache), first_step(name, cache)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            both = [training(NETWORKS[name], device, compiled=fast) for fast in (False, True)]
            times = [[seconds(each) for each in both] for _ in range(5 if arguments.quick else 25)][
                2:
            ]
        plain, fast = (statistics.median(each) for each in zip(*times, strict=True))
        ratios = [one / other for one, other in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "network": name,
                "ms per step": f"{1e3 * plain:.1f}",
                "compiled": f"{1e3 * fast:.1f}",
                "times as fast": f"{statistics.median(ratios):.2f}",
                "quartiles": f"{low:.2f} to {high:.2f}",
                "seconds to compile": f"{cold - fast:.1f}",
                "with the code on disk": f"{warm - fast:.1f}",
                "pays back after": f"{(cold - fast) / (plain - fast):,.0f} steps"
                if plain > fast
                else "never",
            }
        )
        if name.startswith("ResNet"):
            goals.append(at_least(f"times as fast, {name}", statistics.median(ratios), GOAL))
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    told = "only the first step of this network, in this process: its seconds"
    run(
        "compiled", compiled, ("--first", {"choices": NETWORKS, "metavar": "NETWORK", "help": told})
    )
