"""Networks and training steps that tests of slimming share."""

from typing import Any

import torch
from torch import nn

import slimfront as sf
from slimfront.trainables.models.resnet import BasicBlock

INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS[:, :3].argmax(1)
IMAGES = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def adam(network: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr)


def step(network: nn.Module, optimizer: Any, slim: sf.Slimming, inputs: Any = INPUTS) -> None:
    loss = nn.functional.cross_entropy(network(inputs), TARGETS[: len(inputs)]) + slim.loss()
    optimizer.zero_grad()
    loss.backward()
    slim.before_step()
    optimizer.step()
    slim.after_step()


def run(
    network: nn.Module, optimizer: Any, slim: sf.Slimming, count: int, inputs: Any = INPUTS
) -> None:
    for _ in range(count):
        step(network, optimizer, slim, inputs)


def zeros(network: nn.Module) -> int:
    return sum(int((parameter == 0).sum()) for parameter in network.parameters())


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
