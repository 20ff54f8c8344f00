"""How long a network takes beside another one: interleaved runs, since the speed of a machine
drifts."""

import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from slimfront.trainables.measures.described import KNOWN, Measure
from slimfront.trainables.options import Options
from slimfront.trainables.tasks.evaluating import evaluating

_LEAST_S = 1e-3
"""A shorter time is not measured: a short network runs several times between two looks at the
clock."""

_MEASURED_S, _CALLS = 0.02, 3
"""`seconds_of` calls for so long, and at least so often."""


SPEEDS = ("latency_ms", "speedup")
"""The measures that are times, or made of them."""

FILE = "{file}"
"""What stands in a command for the path of the file."""

Runtime = Literal["torch", "onnx", "openvino"]
RUNTIMES: dict[Runtime, str] = {
    "torch": "torch",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}
"""What people call each runtime."""


class Latency(Options):
    """How latency is measured: on batches of `batch_size`, with `threads` of the CPU, `runs` times
    after `warm_up` more.

    `runtime` runs the network: `torch` as it is, where it was trained; `onnx` and `openvino` its
    ONNX file, on the CPU. `command` is a command of the user's that takes the time instead: it is
    run without a shell, with the path of the ONNX file for `{file}`, and the last line that it
    prints is a number of milliseconds; it is ended after `timeout` seconds, 60 if left out.
    """

    batch_size: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    runs: int = Field(21, ge=3)
    warm_up: int = Field(3, ge=0)
    runtime: Runtime = "torch"
    command: str | None = None
    timeout: float | None = Field(None, gt=0, le=86_400)

    @field_validator("command")
    @classmethod
    def _is_given_the_file(cls, command: str | None) -> str | None:
        if command is None:
            return None
        try:
            words = shlex.split(command)
        except ValueError as error:
            said = str(error).lower()
            raise ValueError(f"'{command}' cannot be split into words: {said}") from None
        if not any(FILE in word for word in words[1:]):
            raise ValueError(
                f"'{command}' is not given the file; write {FILE} where its path is to stand, such "
                f"as './time {FILE}'"
            )
        return command

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.command is not None and self.runtime != "torch":
            raise ValueError(
                f"runtime: {self.runtime} and command are two ways to take times; leave one out"
            )
        if self.timeout is not None and self.command is None:
            raise ValueError("timeout is for a command, and there is none; leave it out")
        return self

    @property
    def of_file(self) -> bool:
        """Whether times are of the exported file, and not of the network in torch."""
        return self.command is not None or self.runtime != "torch"

    @property
    def taken(self) -> str:
        """How times are taken, for people: in ONNX Runtime, or by a command."""
        if self.command is not None:
            return "by latency.command"
        return f"in {RUNTIMES[self.runtime]}"

    def described(self) -> dict[str, Measure]:
        """What is known of the measures that are times, with how they are taken."""
        if not self.of_file:
            return {name: KNOWN[name] for name in SPEEDS}
        where = "command" if self.command is not None else self.runtime
        found = {}
        for name in SPEEDS:
            known = KNOWN[name]
            found[name] = replace(
                known, label=f"{known.axis}, {self.taken}", short=f"{name}_{where}"
            )
        return found


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
    runs = [_run(network, batch) for network in networks]
    with ExitStack() as within:
        for network in networks:
            within.enter_context(evaluating(network))
        within.enter_context(threads_set(options.threads))
        for run in runs:
            for _ in range(options.warm_up):
                run(1)
        rounds = _interleaved(runs, options.runs)
    timings = []
    for index in range(len(networks)):
        times = []
        speedups = []
        for seconds in rounds:
            times.append(1000 * seconds[index])
            speedups.append(seconds[0] / seconds[index])
        timings.append(Timing(tuple(times), tuple(speedups)))
    return timings


def _interleaved(runs: Sequence[Callable[[int], float]], rounds: int) -> list[list[float]]:
    """Seconds per batch, by round and network; every other round is backwards."""
    repeats = []
    for run in runs:
        once = max(run(1), 1e-9)
        repeats.append(max(1, round(_LEAST_S / once)))
    order = list(range(len(runs)))
    seconds = []
    for _ in range(rounds):
        taken = [0.0 for _ in runs]
        for index in order:
            taken[index] = runs[index](repeats[index])
        seconds.append(taken)
        order.reverse()
    return seconds


def _run(network: nn.Module, batch: Tensor) -> Callable[[int], float]:
    def run(repeats: int) -> float:
        """Seconds per batch."""
        _wait_for(batch.device)
        begun = time.perf_counter()
        for _ in range(repeats):
            network(batch)
        _wait_for(batch.device)
        spent = time.perf_counter() - begun
        return spent / repeats

    return run


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(take: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `take`, which computes on `device`: the mean of a few after two that
    warm up."""
    for _ in range(2):
        take()
    _wait_for(device)
    taken = 0
    begun = time.perf_counter()
    while taken < _CALLS or time.perf_counter() - begun < _MEASURED_S:
        take()
        taken += 1
        _wait_for(device)
    spent = time.perf_counter() - begun
    return spent / taken


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
