"""Optimisers and learning rates, for training and for refit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


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
    sgd = isinstance(optimizer, torch.optim.SGD)
    states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
    gradients = [parameter.grad for parameter in group["params"]]
    alike = len({(parameter.dtype, parameter.device) for parameter in group["params"]}) == 1
    ready = all(states) or (sgd and not group["momentum"])
    if (sgd and lr is None) or not (alike and ready and all(g is not None for g in gradients)):
        optimizer.step()  # makes the state, and knows what to do where there is no gradient
        return
    rate = group["lr"] if lr is None else lr
    if sgd:
        sgd_(
            group,
            group["params"],
            gradients,
            [state["momentum_buffer"] for state in states] if group["momentum"] else [],
            rate,
        )
        return
    first, second, steps = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    with torch.no_grad():
        torch._foreach_add_(steps, 1)
        adam_(group, group["params"], gradients, first, second, steps, rate)


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
    with torch.no_grad():
        torch._fused_sgd_(
            weights,
            gradients,
            momenta,
            **given,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )  # type: ignore[call-overload]


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
    kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
    given = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    kernel(weights, gradients, first, second, [], steps, **given, amsgrad=False, maximize=False)


def scheduled(lr: float, schedule: Schedule, progress: float) -> float:
    """The learning rate at `progress` (0 to 1) of training: constant, or falling from `lr` to 0 on
    half a cosine."""
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
