"""Optimisers and learning rates, for training and for refit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.torch_internals import count_up, fused_adam, fused_sgd

OptimizerName = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine"]


def build_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """torch's optimiser of that name, fused; `momentum` is for sgd."""
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
        )
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def take_step(optimizer: torch.optim.Optimizer, lr: Tensor | None = None) -> None:
    """`optimizer.step()` of one that `build_optimizer` made; its kernel is called at once where
    that is possible.

    What torch does around it takes as long as the kernel on a small network. Hooks of the optimiser
    are not called.

    Args:
        lr: the learning rate, a float32 scalar on the device of the parameters; the optimiser's own
            if None.
    """
    (group,) = optimizer.param_groups
    weights = group["params"]
    states = [optimizer.state.get(weight, {}) for weight in weights]
    if not _kernel_suffices(optimizer, states, lr):
        # It makes the state, and knows what to do where there is no gradient.
        optimizer.step()
        return
    gradients = [weight.grad for weight in weights]
    rate = group["lr"] if lr is None else lr
    if isinstance(optimizer, torch.optim.SGD):
        momenta = []
        if group["momentum"]:
            momenta = _of_each(states, "momentum_buffer")
        sgd_(group, weights, gradients, momenta, rate)
        return
    first = _of_each(states, "exp_avg")
    second = _of_each(states, "exp_avg_sq")
    steps = _of_each(states, "step")
    with torch.no_grad():
        count_up(steps)
        adam_(group, weights, gradients, first, second, steps, rate)


def _kernel_suffices(
    optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor]], lr: Tensor | None
) -> bool:
    """Whether there is a gradient and a state for each parameter, all of one type and device."""
    (group,) = optimizer.param_groups
    ready = all(states)
    if isinstance(optimizer, torch.optim.SGD):
        if lr is None:
            return False
        # Without momentum there is no state.
        ready = ready or not group["momentum"]
    if not ready:
        return False
    kinds = set()
    for weight in group["params"]:
        if weight.grad is None:
            return False
        kinds.add((weight.dtype, weight.device))
    return len(kinds) == 1


def _of_each(states: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor]:
    return [state[name] for state in states]


def sgd_(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float | Tensor,
) -> None:
    """SGD's step, in place, by torch's fused kernel.

    Args:
        group: the optimiser's hyperparameters, all but the learning rate `lr`.
        weights: parameters of one type and device; `gradients` and `momenta` are of their shapes.
            Without momentum the latter are none. Momenta of zeros make a first step.
        lr: a number, or a float32 scalar on the device.
    """
    given = {
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "lr": lr,
        "dampening": 0.0,
    }
    fixed = {"nesterov": False, "maximize": False, "is_first_step": False}
    kernel = fused_sgd()
    with torch.no_grad():
        kernel(weights, gradients, momenta, **given, **fixed)


def adam_(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float | Tensor,
) -> None:
    """Adam's step, or AdamW's, in place, by torch's fused kernel.

    Args:
        group: the optimiser's hyperparameters, all but the learning rate `lr`.
        weights: parameters of one type and device; `gradients` and the moments `first` and `second`
            are of their shapes.
        steps: a scalar for each, the number of this step, from 1.
        lr: a number, or a float32 scalar on the device.
    """
    kernel = fused_adam(group)
    beta1, beta2 = group["betas"]
    given = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
    }
    kernel(weights, gradients, first, second, [], steps, **given, amsgrad=False, maximize=False)


def scheduled(lr: float, schedule: Schedule, progress: float) -> float:
    """The learning rate at `progress` (0 to 1) of training: constant, or falling from `lr` to 0 on
    half a cosine."""
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
