"""What Slimming is given, and what can be made of it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimfront.trainables.data import Split
from slimfront.trainables.errors import OF_USERS_CODE, UserError
from slimfront.trainables.inputs import each
from slimfront.trainables.structure.agreement import outputs, refuse_opaque
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.slimming.acting import Asked

Loss = Callable[[Any, Any], Tensor]
Examples = Callable[[int], Split]
"""Gives so many examples."""


def check_arguments(network: object, optimizer: object, steps: object) -> None:
    """Raises UserError for what is something else than it should be."""
    if not isinstance(network, nn.Module):
        raise UserError(f"Slimming: the network is a {_kind(network)}; give a torch.nn.Module")
    if not hasattr(optimizer, "param_groups"):
        raise UserError(
            f"Slimming: the optimizer is a {_kind(optimizer)}; give the torch.optim.Optimizer that "
            "trains the network"
        )
    if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1:
        raise UserError(
            f"Slimming: steps is {steps!r}; it must be the optimiser steps to come, a whole number "
            "from 1"
        )


def _kind(given: object) -> str:
    if isinstance(given, type):
        return f"class, {given.__name__}"
    return type(given).__name__


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser within a wrapper, such as Accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def unwrapped(network: nn.Module) -> nn.Module:
    """The network within DistributedDataParallel, torch.compile or AveragedModel."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if isinstance(network, _WRAPPERS):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def beside(inputs: Tensor, network: nn.Module) -> Tensor:
    """The inputs on the device of a network."""
    device = next(network.parameters()).device
    return each(inputs, lambda tensor: tensor.to(device))


def per_epoch(asked: Asked, steps_per_epoch: int | None) -> int:
    """How many steps an epoch has, for penalties that rise over epochs."""
    rising = []
    for name, options in asked.penalties.items():
        rises = options.warmup or options.ramp
        if options.on and rises:
            rising.append(name)
    if steps_per_epoch is None and rising:
        raise UserError(
            f"Slimming: penalties.{rising[0]} has a warmup or ramp, which is in epochs; give "
            "steps_per_epoch"
        )
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise UserError(f"Slimming: steps_per_epoch is {steps_per_epoch}; it must be at least 1")
    return steps_per_epoch or 1


def refuse_opaque_outputs(network: nn.Module, sample: Tensor) -> None:
    """Raises UserError where a network returns objects that hold tensors, such as distributions:
    nothing could be made compact when the training is over."""
    made: Any = None
    with suppress(*OF_USERS_CODE), evaluating(network), torch.no_grad():
        made = outputs(network, sample[:2])
    refuse_opaque(made)


def examples_of(sample: Tensor, targets: Tensor | None) -> Examples:
    """The first of a batch, for a sparsifier that looks at some before training."""

    def examples(count: int) -> Split:
        inputs = sample[:count]
        if targets is not None:
            wanted = targets[:count]
            return Split(inputs, wanted)
        size = len(inputs)
        none = torch.zeros(size, dtype=torch.int64)
        return Split(inputs, none)

    return examples


def loss_of(loss: Loss | None, targets: Tensor | None) -> Loss:
    """The loss that was given, or one that says, where it is needed, that there is none."""
    if loss is not None and targets is not None:
        return loss

    def missing(_outputs: Any, _targets: Any) -> Tensor:
        raise UserError(
            "Slimming: the sparsifier looks at the loss before training; give the targets of the "
            "inputs, and the loss"
        )

    return missing


def broadcast(given: Iterable[Tensor]) -> None:
    """Gives all processes of a training the tensors of the first."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in given:
        as_bytes = tensor.to(torch.uint8)
        dist.broadcast(as_bytes, src=0)
        tensor.copy_(as_bytes)
