"""Layers as matrices: what they multiply, and what comes out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.sparsifiers.base import is_own_layer

_ROWS, _ENTRIES = 2**14, 2**26
"""So many rows are taken of what a layer sees, or fewer where they have so many entries."""
_FOR_EACH = 4
"""So many rows for each input of a group, where that is more."""


@dataclass(frozen=True)
class Matrix:
    """A layer as a matrix, or one for each of its groups: y = x Wᵀ + b."""

    weight: Tensor
    """(groups, outputs, inputs)"""
    bias: Tensor | None
    """(groups, outputs)"""


def can_be_fitted(layer: nn.Module) -> bool:
    """Whether a layer is a matrix, and its weight a parameter that is read as it is."""
    own = dict(layer.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return True
    return is_own_layer(layer) and weight.dim() == 2


def matrix_of(layer: nn.Module) -> Matrix:
    """Its weight by group, output and input, where an input of a convolution is a channel at a
    place of the kernel."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        weight = weight.t()
    by_output = weight.flatten(1).unflatten(0, (groups_of(layer), -1))
    if bias is None:
        return Matrix(by_output, None)
    return Matrix(by_output, bias.detach().unflatten(0, (groups_of(layer), -1)))


def groups_of(layer: nn.Module) -> int:
    """Of how many groups it is."""
    return layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1


@torch.no_grad()
def set_matrix(layer: nn.Module, found: Matrix) -> None:
    """The other way round, in place."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    new = found.weight.flatten(0, 1)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        new = new.t()
    weight.copy_(new.reshape(weight.shape))
    if found.bias is not None:
        bias: Tensor = layer.bias  # type: ignore[assignment]
        bias.copy_(found.bias.flatten())


def axis_of_outputs(layer: nn.Module) -> int:
    """Along which axis of what it gives its outputs lie, counted from the last."""
    if isinstance(layer, nn.Conv1d):
        return -2
    return -3 if isinstance(layer, nn.Conv2d) else -1


def rows_of(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer multiplies, (groups, rows, inputs), and what comes out, (groups, rows, outputs):
    of every place of every example, or of some of them, drawn with a fixed seed.

    Args:
        x: what it is given.
        y: what it gives, or another one that is to be matched.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        chosen = _some(len(x), x.shape[1], 1, x.device)
        return x[chosen].unsqueeze(0), y[chosen].unsqueeze(0)
    is_batch = x.dim() == layer.weight.dim()
    if not is_batch:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    y = y.flatten(2).transpose(1, 2)
    places = y.shape[1]
    chosen = _some(len(x) * places, layer.weight[0].numel(), layer.groups, x.device)
    of_example = torch.bincount(chosen // places, minlength=len(x)).tolist()
    rows = []
    start = 0
    for example, count in enumerate(of_example):
        if count:
            within = chosen[start : start + count] % places
            rows.append(_patches(layer, x[example : example + 1])[within])
        start += count
    return _by_group(layer, torch.cat(rows)), _by_group(layer, y.flatten(0, 1)[chosen])


def _by_group(layer: nn.Conv1d | nn.Conv2d, rows: Tensor) -> Tensor:
    """(rows, groups · numbers) to (groups, rows, numbers)."""
    by_group: Tensor = rows.unflatten(1, (layer.groups, -1))
    return by_group.transpose(0, 1)


def _some(total: int, inputs: int, groups: int, device: torch.device) -> Tensor:
    """Places among so many rows, in order."""
    fitting = min(_ROWS, _ENTRIES // (inputs * groups))
    most = max(fitting, _FOR_EACH * inputs)
    if total <= most:
        return torch.arange(total, device=device)
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(total, generator=draw)[:most]
    return chosen.sort().values.to(device)


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution multiplies at each place of one example: (places, channels · kernel)."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padding: list[int] = []
    for axis in reversed(range(len(kernel))):
        padding += _padded(layer, axis)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(padding):
        x = F.pad(x, padding, mode)
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation, 0, stride)[0].t()


def _padded(layer: nn.Conv1d | nn.Conv2d, axis: int) -> list[int]:
    """What is padded in front of an axis of the image, and behind it."""
    if layer.padding == "valid":
        return [0, 0]
    if layer.padding == "same":
        whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return [whole // 2, math.ceil(whole / 2)]
    amount = layer.padding[axis]
    assert isinstance(amount, int)
    return [amount, amount]
