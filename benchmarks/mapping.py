"""Ways to put packs of trials onto Ray Tune: an actor for each trial, and slots in shared
processes; and packs without Ray Tune.

Two packs of 16. What a pack trains and finishes in one process without Ray Tune is the least that
any mapping can take.
"""

import argparse
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from benchmarks.common import Outcome, run
from benchmarks.throughput import LR, PACK, STRENGTH, config_of, ours, workloads
from slimfront.search.engine.nodes import start_local_ray
from slimfront.trainables.packs import Pack
from slimfront.trainables.packs.together import SharedProcess
from slimfront.trainables.shipping.network_file import store

PROCESSES = 2


class Thin:
    """What every trainable of Ray Tune's imports."""

    def __init__(self) -> None:
        import ray.tune  # noqa: F401

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def stop(self) -> None:
        """Nothing."""


def started(*, shared: bool) -> tuple[float, float, float]:
    """Seconds, core-seconds and megabytes (of their own) until 32 trials could begin."""
    start_local_ray()
    begun, before = time.monotonic(), core_seconds()
    if shared:
        made = ray.remote(num_cpus=1, max_concurrency=PACK)(SharedProcess)
        actors = [made.remote(Thin) for _ in range(PROCESSES)]  # type: ignore[attr-defined]
        ray.get([actor.create.remote(slot, {}) for actor in actors for slot in range(PACK)])
        pids = set(ray.get([actor.call.remote(0, "pid", (), {}) for actor in actors]))
    else:
        thin = ray.remote(num_cpus=0)(Thin)
        actors = [thin.remote() for _ in range(PROCESSES * PACK)]  # type: ignore[attr-defined]
        pids = set(ray.get([actor.pid.remote() for actor in actors]))
    taken = time.monotonic() - begun, core_seconds() - before
    memory = sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / 1e6
    ray.shutdown()
    return (*taken, memory)


def core_seconds() -> float:
    """Of all processes that this one has started."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def without_ray_tune() -> float:
    """Core-seconds per trial of packs in this process: trained, finished, and made plain data."""
    torch.set_num_threads(1)
    random.seed(0)
    config = config_of(workloads(Path(), quick=True)[0], 1, Path())
    spent = []
    for turn in range(2):
        begun = time.process_time()
        pack = Pack(config.candidate(values(turn * PACK + number)) for number in range(PACK))
        members = list(pack.members)
        while pack.members:
            pack.run_epoch()
        for member in members:
            finished = member.finish()
            for network in (finished, *finished.pruned):
                store(
                    network.compacted.network,
                    member.candidate.model,
                    member.data.input_shape,
                    member.data.head,
                )
        spent.append((time.process_time() - begun) / PACK)
    return min(spent)  # without what is imported and loaded the first time


def values(seed: int) -> dict[str, Any]:
    """A candidate of the space."""
    chosen = {"training.lr": LR, "penalties.connection.strength": STRENGTH}
    drawn = {path: low * (high / low) ** random.random() for path, (low, high) in chosen.items()}  # noqa: S311 (nothing secret)
    return drawn | {"training.seed": seed}


def mapping(arguments: argparse.Namespace) -> Outcome:
    """What each way takes to start, and per trial of the digits MLP."""
    logging.getLogger().setLevel(logging.ERROR)
    rows = []
    for name, shared in (("an actor for each trial", False), ("slots in shared processes", True)):
        seconds, cores, memory = started(shared=shared)
        rows.append(
            {
                "32 trials": name,
                "seconds to start": f"{seconds:.1f}",
                "core-seconds to start": f"{cores:.1f}",
                "MB of their own": f"{memory:,.0f}",
                "core-seconds per trial, in trials": "not built",
            }
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        taken = ours(
            workloads(Path(), quick=True)[0], 64 if arguments.quick else 192, Path(folder), PACK
        )
    rows[1]["core-seconds per trial, in trials"] = f"{taken.core_seconds()['trials']:.3f}"
    bound = {
        "32 trials": "packs without Ray Tune",
        "core-seconds per trial, in trials": f"{without_ray_tune():.3f}",
    }
    return Outcome(1, [*rows, dict.fromkeys(rows[0], "") | bound], [])


if __name__ == "__main__":
    run("mapping", mapping)
