"""Latency: ratios of interleaved runs. No test here depends on how fast this machine is."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront.trainables.measures.latency import Latency, time_networks


class Counts(nn.Module):
    """Remembers the batches that it saw and who else was called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.threads: set[int] = set()
        self.sizes: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.name)
        self.threads.add(torch.get_num_threads())
        self.sizes.add(len(x))
        return x @ torch.ones(x.shape[1], 2000) @ torch.ones(2000, 1)


class Clock:
    """A clock that only networks move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Takes(nn.Module):
    """Takes so many seconds, and more each time by the drift of the machine."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.seconds, self.clock = seconds, clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds * (1 + self.clock.now / 10)
        return x


def test_times_are_medians_and_speedups_are_ratios_of_one_round_so_that_drift_cancels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("slimfront.trainables.measures.latency.time", clock)
    large, small = Takes(0.02, clock), Takes(0.005, clock)
    of_large, of_small = time_networks([large, small], torch.randn(4, 3), Latency(runs=9))
    assert of_large.speedup == 1
    assert of_small.speedup == pytest.approx(4, rel=0.02)
    assert of_large.times[-1] > 1.02 * of_large.times[0]  # the machine did drift
    assert of_small.latency_ms == sorted(of_small.times)[4]
    first, third = of_small.spread
    assert first <= of_small.speedup <= third


def test_runs_are_interleaved_with_the_batch_size_and_threads_that_are_asked_for() -> None:
    calls: list[str] = []
    networks = [Counts("a", calls), Counts("b", calls)]
    before = torch.get_num_threads()
    timings = time_networks(
        networks, torch.randn(3, 8), Latency(batch_size=7, threads=2, runs=4, warm_up=1)
    )
    assert torch.get_num_threads() == before
    assert all(network.sizes == {7} and network.threads == {2} for network in networks)
    assert all(len(timing.times) == 4 for timing in timings)
    blocks = [name for place, name in enumerate(calls) if place == 0 or calls[place - 1] != name]
    # Warm-up a b, a look at how often to repeat a b, and rounds a b, b a, a b, b a, where
    # neighbours of one name are one block.
    assert "".join(blocks) == "ababababa"


def test_the_mode_of_the_networks_is_as_it_was() -> None:
    network = nn.Dropout(0.5).train()
    time_networks([network], torch.ones(1, 3), Latency(runs=3))
    assert network.training


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"command": "ssh device ./time"}, "is not given the file; write {file} where"),
        ({"command": ""}, "is not given the file"),
        ({"command": "{file}"}, "is not given the file"),
        ({"command": "time '{file}"}, "cannot be split into words: no closing quotation"),
        ({"command": "time {file}", "runtime": "onnx"}, "are two ways to take times"),
        ({"timeout": 5}, "timeout is for a command, and there is none"),
        ({"command": "time {file}", "timeout": 0}, "greater than 0"),
        ({"runtime": "tflite"}, "'torch', 'onnx' or 'openvino'"),
    ],
)
def test_what_cannot_time_a_network_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Latency.model_validate(options)


def test_labels_and_heads_say_what_took_the_times() -> None:
    plain = Latency().described()
    assert plain["latency_ms"].axis == "latency, ms per batch"
    assert plain["latency_ms"].head == "latency_ms"
    onnx = Latency(runtime="onnx").described()
    assert onnx["latency_ms"].axis == "latency, ms per batch, in ONNX Runtime"
    assert onnx["speedup"].axis == "times faster than the dense network, in ONNX Runtime"
    assert onnx["speedup"].head == "speedup_onnx"
    command = Latency(command="ssh device ./time {file}").described()
    assert command["latency_ms"].axis == "latency, ms per batch, by latency.command"
    assert command["latency_ms"].head == "latency_ms_command"
