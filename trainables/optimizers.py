"""Optimisers and learning rates, for training and for refit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

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


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` of one that `build_optimizer` made; Adam's kernel is called at once where that is possible.

    What torch does around it takes as long as the kernel on a small network. Hooks of the optimiser are not called.
    """
    (group,) = optimizer.param_groups
    states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
    gradients = [parameter.grad for parameter in group["params"]]
    alike = len({(parameter.dtype, parameter.device) for parameter in group["params"]}) == 1
    if isinstance(optimizer, torch.optim.SGD) or not (alike and all(states) and all(g is not None for g in gradients)):
        optimizer.step()  # makes the state, and knows what to do where there is no gradient
        return
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    with torch.no_grad():
        torch._foreach_add_(steps, 1)
        adam_(group, group["params"], gradients, first, second, steps, group["lr"])


def adam_(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
) -> None:
    """Adam's step, or AdamW's, in place, by torch's fused kernel.

    Args:
        group: the optimiser's hyperparameters, all but the learning rate `lr`.
        weights: parameters of one type and device; `gradients` and the moments `first` and `second` are of their shapes.
        steps: a scalar for each, the number of this step, from 1.
    """
    kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
    given = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    kernel(weights, gradients, first, second, [], steps, **given, amsgrad=False, maximize=False)


def scheduled(lr: float, schedule: Schedule, progress: float) -> float:
    """The learning rate at `progress` (0 to 1) of training: constant, or falling from `lr` to 0 on half a cosine."""
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
