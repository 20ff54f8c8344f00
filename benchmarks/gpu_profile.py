"""Where the time of training steps goes on a GPU: kernels per step, how long it is busy, and the
kernels that take longest."""

import argparse
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Outcome, run
from benchmarks.gpu import (
    BF16_LAST,
    COMPILED,
    LESS,
    NO_GRAPHS,
    TINY,
    Plain,
    Rival,
    Together,
    seconds,
    training,
)


def watched(name: str, rival: Rival, device: torch.device, steps: int) -> dict[str, Any]:
    """A row of the table: one epoch of `steps` steps of a rival."""
    for _ in range(2):
        seconds(rival, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    wall = seconds(rival, device)
    with profile(activities=activities) as profiler:
        begun = time.perf_counter()
        rival.epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        profiled = time.perf_counter() - begun
    on_gpu = [
        event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    print(f"\n{name}, profiled in {profiled:.2f} s")
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(
        profiler.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=80),
        flush=True,
    )
    launches = sum(
        "LaunchKernel" in event.name or "GraphLaunch" in event.name for event in profiler.events()
    )
    all_steps = steps * rival.candidates
    kernels_ms = sum(event.device_time for event in on_gpu) / 1e3
    return {
        "training": name,
        "ms per step of a candidate": f"{1e3 * wall / all_steps:.3f}",
        "kernels and copies per step": f"{len(on_gpu) / all_steps:.0f}",
        "launches by the CPU per step": f"{launches / all_steps:.1f}",
        "ms of kernels per step, added up": f"{kernels_ms / all_steps:.3f}",
    }


def gpu_profile(_arguments: argparse.Namespace) -> Outcome:
    """Profiles of the plain loop, of one candidate with and without graphs, and of a pack."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = TINY if device.type == "cpu" else LESS
    fast = {"training": BF16_LAST}
    slow = {"training": BF16_LAST | NO_GRAPHS}
    one = training(device, scale, **fast)
    made: dict[str, Rival] = {
        "plain loop": Plain(one, bf16=True, channels_last=True),
        "one candidate, without graphs": Together([training(device, scale, **slow)]),
        "one candidate": Together([one]),
        "pack": Together(
            [training(device, scale, number, **fast) for number in range(scale.packs[-1])]
        ),
    }
    if device.type == "cuda":
        made["one candidate, compiled"] = Together(
            [training(device, scale, training=BF16_LAST | COMPILED)]
        )
    rows = [watched(name, rival, device, one.steps_per_epoch()) for name, rival in made.items()]
    return Outcome(1, rows, [])


if __name__ == "__main__":
    run("gpu_profile", gpu_profile)
