"""How long the steps of an optimiser are for the proximal steps of penalties, and which optimisers
penalties and sparsifiers can work beside."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties import Penalty
from slimfront.trainables.penalties.base import GroupPenalty, StepSizes

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
        if isinstance(parameter, DTensor):
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
