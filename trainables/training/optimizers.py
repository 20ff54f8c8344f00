"""Optimisers and learning rates, for training and for refit; and how long the steps of any
optimiser are for the proximal steps of penalties."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties import Penalty
from slimfront.trainables.penalties.base import GroupPenalty, StepSizes
from slimfront.trainables.torch_internals import (
    count_up,
    fused_adam,
    fused_sgd,
    without_compiler,
)

OptimizerName = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine"]


LR_FACTOR = "lr_factor"
"""The key of a parameter group whose learning rate is so many times that of the training."""

Trained = Iterable[nn.Parameter] | list[dict[str, Any]]
"""Parameters, or parameter groups."""


def trained_parameters(network: nn.Module, factors: Mapping[str, float]) -> Trained:
    """The parameters of a network that require a gradient; where `factors` are given, in a group
    for each factor.

    Args:
        factors: of the learning rate, by the names of parameters, with `*` for any characters; the
            first that a name fits counts, and 1 for others.

    Raises:
        UserError: if no parameter requires a gradient.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError(
            "no parameter of the network requires a gradient, so that nothing of it can be "
            "trained; set requires_grad in its code for what is to be trained"
        )
    if not factors:
        return trained
    of_parameters = {}
    for name, parameter in network.named_parameters():
        of_parameters[parameter] = _factor(name, factors)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in trained:
        factor = of_parameters[parameter]
        groups.setdefault(factor, []).append(parameter)
    return [{"params": group, LR_FACTOR: factor} for factor, group in groups.items()]


def _factor(name: str, factors: Mapping[str, float]) -> float:
    for pattern, factor in factors.items():
        if fnmatchcase(name, pattern):
            return factor
    return 1.0


def build_optimizer(
    name: OptimizerName,
    parameters: Trained,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """torch's optimiser of that name, fused; `momentum` is for sgd."""
    with without_compiler():
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

    What torch does around it takes as long as the kernel on a small network, and loads torch's
    compiler. Hooks of the optimiser are not called.

    Args:
        lr: the learning rate, a float32 scalar on the device of the parameters; the optimiser's own
            if None.
    """
    if len(optimizer.param_groups) > 1:
        assert lr is None
        optimizer.step()
        return
    (group,) = optimizer.param_groups
    weights = group["params"]
    if not optimizer.state:
        _begin(optimizer)
    states = [optimizer.state.get(weight, {}) for weight in weights]
    if not _kernel_suffices(optimizer, states):
        # It knows what to do where there is no gradient.
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


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Makes what an optimiser remembers before its first step, as its own `step` does: zeros for
    each parameter that has a gradient."""
    (group,) = optimizer.param_groups
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    if is_sgd and not group["momentum"]:
        return
    for weight in group["params"]:
        if weight.grad is None:
            continue
        state = optimizer.state[weight]
        if is_sgd:
            state["momentum_buffer"] = torch.zeros_like(weight)
            continue
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)


def _kernel_suffices(
    optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor]]
) -> bool:
    """Whether there is a gradient and a state for each parameter, all of one type and device."""
    (group,) = optimizer.param_groups
    ready = all(states)
    if isinstance(optimizer, torch.optim.SGD):
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
    """Sets the learning rate of all parameters; of groups that have a factor, so many times
    that."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


_WITH_MOMENTUM = (torch.optim.SGD, torch.optim.RMSprop)
"""Their momentum is a sum of steps, and no mean."""


def step_sizes(optimizer: torch.optim.Optimizer) -> StepSizes:
    """The step size of each parameter that the optimiser trains, as its parameter groups are
    now."""
    of_parameters: dict[int, float | Tensor] = {}
    for group in optimizer.param_groups:
        size = _step_size(optimizer, group)
        for parameter in group["params"]:
            if parameter.requires_grad:
                of_parameters[id(parameter)] = size
    return StepSizes(of_parameters)


def _step_size(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate; where there is momentum, gradients act that much longer."""
    size: float | Tensor = group["lr"]
    momentum = group.get("momentum", 0)
    if isinstance(optimizer, _WITH_MOMENTUM) and momentum:
        longer: float = (1 - group.get("dampening", 0)) / (1 - momentum)
        return size * longer
    return size


def check_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, penalties: Mapping[str, Penalty]
) -> None:
    """Refuses what penalties and sparsifiers cannot work beside.

    Raises:
        UserError: for an optimiser that steps several times in one call, that has no learning rate
            or none of the network's parameters, or that keeps weights apart for evaluation beside
            proximal steps; and for parameters that are sharded, or not there yet.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"Slimming: {kind} evaluates the loss several times in a step, between which nothing "
            "can be zeroed; take an optimiser of one evaluation, such as AdamW or SGD"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise UserError(f"Slimming: the parameter groups of {kind} have no learning rate 'lr'")
    own = dict(network.named_parameters())
    for name, parameter in own.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"Slimming: '{name}' is not there yet; run the network once before")
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes long to import
            raise UserError(
                f"Slimming: '{name}' is sharded over processes, of which each sees a part of a "
                "group of weights; train with DistributedDataParallel"
            )
    trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if not any(id(parameter) in trained for parameter in own.values()):
        raise UserError(f"Slimming: {kind} has none of the network's parameters")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        _refuse_proximal(kind, penalties)


def _refuse_proximal(kind: str, penalties: Mapping[str, Penalty]) -> None:
    for name, options in penalties.items():
        if options.on and isinstance(options, GroupPenalty) and options.form == "proximal":
            raise UserError(
                f"Slimming: {kind} keeps weights apart for evaluation, which proximal steps would "
                f"not reach; give penalties.{name} 'form: gradient', or take another optimiser"
            )
