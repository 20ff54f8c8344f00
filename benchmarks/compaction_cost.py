"""What compaction and its check cost: against one forward and backward pass of the same inputs, in
time, and what it holds in memory for more inputs.

A ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1) of random weights, half of whose units
within blocks, and half of those that blocks share, are zero.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Outcome, at_most, run
from slimfront.trainables.compaction import compact

BLOCKS = (3, 4, 6, 3)
PASSES = 3.0
"""Compaction may take as long as so many forward and backward passes of its inputs."""
GROWTH = 1.2
"""And hold so many times the memory for twice as many inputs, those themselves apart."""


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 · width, H / stride, W / stride)."""
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        out: Tensor = self.relu(self.bn3(self.conv3(branch)) + self.shortcut(x))
        return out


def resnet50(classes: int = 1000) -> nn.Module:
    """The network, with half of its units zero."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(BLOCKS):
        width = 64 * 2**stage
        for number in range(count):
            layers.append(Bottleneck(inputs, width, 2 if stage and not number else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    network = nn.Sequential(*layers, *head)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[1::2] = 0
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor[1::2] = 0
    return network


def seconds_of_training(network: nn.Module, inputs: Tensor) -> float:
    """One forward and backward pass of these inputs."""
    network.train()
    start = time.perf_counter()
    network(inputs).square().mean().backward()
    return time.perf_counter() - start


def seconds_of_compaction(network: nn.Module, inputs: Tensor) -> float:
    """Compaction with its check, on these inputs."""
    start = time.perf_counter()
    before = sum(parameter.numel() for parameter in network.parameters())
    made = compact(network, inputs).network
    assert sum(parameter.numel() for parameter in made.parameters()) < before / 3
    return time.perf_counter() - start


def memory(count: int, size: int) -> float:
    """Bytes that a process of its own holds at most in compaction on so many inputs, but for the
    inputs themselves.

    A process starts with the peak of the one that starts it, so this comes before all else.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (count, size))


def _memory(count: int, size: int) -> float:
    network, inputs = resnet50(), torch.randn(count, 3, size, size)
    compact(network, inputs)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return float(most - inputs.numel() * inputs.element_size())


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """Seconds and bytes of compaction for a ResNet-50, by the number of inputs."""
    torch.set_num_threads(arguments.threads)
    size, counts = (64, (32,)) if arguments.quick else (224, (32, 64))
    held = {count: memory(count, size) for count in counts}
    rows: list[dict[str, Any]] = []
    ratios = {}
    for count in counts:
        inputs = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        taken: list[tuple[float, float]] = []
        for _ in range(1 if arguments.quick else arguments.repeats):
            training = seconds_of_training(resnet50(), inputs)
            taken.append((training, seconds_of_compaction(resnet50(), inputs)))
        training, compaction = (statistics.median(times) for times in zip(*taken, strict=True))
        ratios[count] = statistics.median(mine / theirs for theirs, mine in taken)
        rows.append(
            {
                "inputs": f"{count} × 3 × {size} × {size}",
                "forward and backward, s": f"{training:.2f}",
                "compaction, s": f"{compaction:.2f}",
                "ratio": f"{ratios[count]:.2f}",
                "memory, MB": f"{held[count] / 1e6:,.0f}",
            }
        )
    goals = [
        at_most(f"compaction over a pass, {count} inputs", ratio, PASSES)
        for count, ratio in ratios.items()
    ]
    if len(rows) > 1:
        few, many = held.values()
        goals.append(at_most("memory for twice the inputs", many / few, GROWTH))
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run(
        "compaction_cost",
        benchmark,
        ("--repeats", {"type": int, "default": 3}),
        ("--threads", {"type": int, "default": torch.get_num_threads()}),
    )
