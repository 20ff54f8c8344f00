"""How long a network takes beside another one: interleaved runs, since the speed of a machine
drifts."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.options import Options

_LEAST_S = 1e-3
"""A shorter time is not measured: a short network runs several times between two looks at the
clock."""

_MEASURED_S, _CALLS = 0.02, 3
"""`seconds_of` calls for so long, and at least so often."""


class Latency(Options):
    """How latency is measured: on batches of `batch_size`, with `threads` of the CPU, `runs` times
    after `warm_up` more."""

    batch_size: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    runs: int = Field(21, ge=3)
    warm_up: int = Field(3, ge=0)


@dataclass(frozen=True)
class Timing:
    """The times of one network, in milliseconds per batch, and how many times faster than the first
    of the networks it was."""

    times: tuple[float, ...]
    speedups: tuple[float, ...]

    @property
    def latency_ms(self) -> float:
        """The median time of a batch."""
        return statistics.median(self.times)

    @property
    def speedup(self) -> float:
        """The median of the ratios that were taken in one round each."""
        return statistics.median(self.speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartiles of the speed-up."""
        first, _, third = statistics.quantiles(self.speedups, n=4)
        return first, third


@torch.inference_mode()
def time_networks(
    networks: Sequence[nn.Module], inputs: Tensor, options: Latency | None = None
) -> list[Timing]:
    """Times networks that take the same inputs, in evaluation mode; each round runs all of them,
    every other one backwards.

    Args:
        inputs: (N, *input_shape), at least one; repeated up to the size of the batch. They and the
            networks are on one device.
    """
    options = options or Latency()
    batch = inputs[torch.arange(options.batch_size) % len(inputs)]
    modes = [network.training for network in networks]
    runs = [_run(network.eval(), batch) for network in networks]
    with threads_set(options.threads):
        for run in runs:
            for _ in range(options.warm_up):
                run(1)
        rounds = _interleaved(runs, options.runs)
    for network, training in zip(networks, modes, strict=True):
        network.train(training)
    timings = []
    for index in range(len(networks)):
        times = tuple(1000 * seconds[index] for seconds in rounds)
        speedups = tuple(seconds[0] / seconds[index] for seconds in rounds)
        timings.append(Timing(times, speedups))
    return timings


def _interleaved(runs: Sequence[Callable[[int], float]], rounds: int) -> list[list[float]]:
    """Seconds per batch, by round and network; every other round is backwards."""
    repeats = [max(1, round(_LEAST_S / max(run(1), 1e-9))) for run in runs]
    forwards = list(range(len(runs)))
    backwards = forwards[::-1]
    seconds = []
    for turn in range(rounds):
        taken = [0.0 for _ in runs]
        for index in forwards if turn % 2 == 0 else backwards:
            taken[index] = runs[index](repeats[index])
        seconds.append(taken)
    return seconds


def _run(network: nn.Module, batch: Tensor) -> Callable[[int], float]:
    def run(repeats: int) -> float:
        """Seconds per batch."""
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        begun = time.perf_counter()
        for _ in range(repeats):
            network(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        return (time.perf_counter() - begun) / repeats

    return run


def seconds_of(take: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `take`, which computes on `device`: the mean of a few after two that
    warm up."""
    for _ in range(2):
        take()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = 0
    begun = time.perf_counter()
    while taken < _CALLS or time.perf_counter() - begun < _MEASURED_S:
        take()
        taken += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / taken


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
