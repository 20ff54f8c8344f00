"""Optimisers and learning rates, for training and for refit."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

OptimizerName = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine"]


def build_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's optimiser of that name, fused; `momentum` is for sgd."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def scheduled(lr: float, schedule: Schedule, progress: float) -> float:
    """The learning rate at `progress` (0 to 1) of training: constant, or falling from `lr` to 0 on half a cosine."""
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
