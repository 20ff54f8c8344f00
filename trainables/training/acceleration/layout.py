"""Channels last: how convolutions on a GPU like images and their weights to lie, the channels of a
pixel beside each other.

Only where numbers lie changes, not which there are: state, packs, compaction and shipped networks
know nothing of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.copying import copied


def channels_last(inputs: Tensor) -> Tensor:
    """Images (N, C, H, W) with their channels last in memory; other inputs as they are."""
    if inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def contiguous_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights lie as torch lays them out by default."""
    twin = copied(model)
    twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return twin


def ambiguous_strides(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those with four dimensions, one of them of size 1: their layout is ambiguous, and that of
    gradients may differ."""
    found = []
    for parameter in parameters:
        if parameter.dim() == 4 and 1 in parameter.shape:
            found.append(parameter)
    return found


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives gradients the strides of their parameters: fused optimisers on a GPU may refuse others
    that mean the same."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        wanted = parameter.stride()
        if gradient.stride() != wanted:
            aligned = torch.empty_like(parameter)
            aligned.copy_(gradient)
            parameter.grad = aligned


def align_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives what the optimiser keeps of a parameter its strides: fused kernels pair numbers by
    their place in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape != parameter.shape:
                continue
            wanted = parameter.stride()
            if value.stride() == wanted:
                continue
            aligned = torch.empty_like(parameter, dtype=value.dtype)
            aligned.copy_(value)
            state[name] = aligned
