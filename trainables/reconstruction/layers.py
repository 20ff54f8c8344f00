"""Layers as matrices: what they multiply, and what comes out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.sparsifiers.base import is_own_layer

_ROWS, _ENTRIES = 2**11, 2**26
"""So many rows are taken of what a layer sees, or fewer where they have so many entries: four times
as many make no difference."""
_FOR_EACH = 2
"""So many rows for each input of a group, where that is more."""
_EXAMPLES, _OF_EACH = 32, 2
"""Places are drawn of so many examples at least, and of so many times as many as are needed."""
_CUT_OUT = 2**23
"""So many entries are cut out of images at a time."""


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
        chosen = _some(len(x), _wanted(x.shape[1], 1), x.device)
        return x[chosen].unsqueeze(0), y[chosen].unsqueeze(0)
    is_batch = x.dim() == layer.weight.dim()
    if not is_batch:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    y = y.flatten(2).transpose(1, 2)
    places = y.shape[1]
    columns = layer.weight[0].numel()
    wanted = _wanted(columns, layer.groups)
    # Not all places of a few examples, nor a few of all, which would have to be cut out.
    examples = _some(len(x), max(_EXAMPLES, math.ceil(_OF_EACH * wanted / places)), x.device)
    chosen = _some(len(examples) * places, wanted, x.device)
    rows = []
    at_once = max(_CUT_OUT // (columns * layer.groups * places), 1)
    for start in range(0, len(examples), at_once):
        patches = _patches(layer, x[examples[start : start + at_once]])
        first, last = start * places, start * places + len(patches)
        within = chosen[(chosen >= first) & (chosen < last)] - first
        rows.append(patches[within])
    of_places = y[examples].flatten(0, 1)[chosen]
    return _by_group(layer, torch.cat(rows)), _by_group(layer, of_places)


def _wanted(inputs: int, groups: int) -> int:
    """How many rows are taken of what a layer sees, of so many inputs for each of its groups."""
    fitting = min(_ROWS, _ENTRIES // (inputs * groups))
    return max(fitting, _FOR_EACH * inputs)


def rows_of_each(layer: nn.Module, made: Tensor) -> float:
    """How many rows a layer sees of each example, for each of its inputs."""
    matrix = matrix_of(layer).weight
    groups, outputs, inputs = matrix.shape
    rows = made.numel() / (groups * outputs * len(made))
    return rows / inputs


def _by_group(layer: nn.Conv1d | nn.Conv2d, rows: Tensor) -> Tensor:
    """(rows, groups · numbers) to (groups, rows, numbers)."""
    by_group: Tensor = rows.unflatten(1, (layer.groups, -1))
    return by_group.transpose(0, 1)


def _some(total: int, most: int, device: torch.device) -> Tensor:
    """So many of some places, in order, drawn with a fixed seed; all, where there are no more."""
    if total <= most:
        return torch.arange(total, device=device)
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(total, generator=draw)[:most]
    return chosen.sort().values.to(device)


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution multiplies at each place of each example: (N · places, channels ·
    kernel)."""
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
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


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
