"""Inputs of other sizes than those at hand: other lengths of sequences, and other sizes of
images."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.inputs import Several, each, tensors

Axis = tuple[int, int]
"""The number of an axis, and its size."""
Change = Callable[[list[Axis], Tensor], Tensor]
"""Makes a tensor of another size along some axes."""
_HALF_IS_ONE_LESS = 2


def of_other_sizes(inputs: Tensor, takes: Callable[[Tensor], Any]) -> Iterator[Tensor]:
    """The same inputs half as long along each axis but the first, or else, for images, twice as
    long, and those shorter by one, since code may go by whether a size is even; where `takes`,
    which is called with them, does not raise.

    Axes of several inputs that have the same number and size are changed together, and so are those
    of one input that have the same size, as the two of an image.
    """
    for axes in _together(inputs):
        changes = [_halved]
        if all(axis > 1 for axis, _ in axes):
            # Images: their sides may have to be multiples of something. More positions than there
            # are would end a process on a GPU.
            changes.append(_doubled)
        yield from _first_taken(inputs, axes, changes, takes)
        if all(size > _HALF_IS_ONE_LESS for _, size in axes):
            yield from _first_taken(inputs, axes, [_shortened], takes)


def _first_taken(
    inputs: Tensor, axes: list[Axis], changes: Sequence[Change], takes: Callable[[Tensor], Any]
) -> Iterator[Tensor]:
    """The inputs with the first of the changes that is taken, if one is."""
    for change in changes:
        other = each(inputs, partial(change, axes))
        if _is_taken(takes, other):
            yield other
            return


def _is_taken(takes: Callable[[Tensor], Any], inputs: Tensor) -> bool:
    try:
        # Graphs print where in them an error was raised.
        with redirect_stderr(io.StringIO()):
            takes(inputs)
    except Exception:  # of any kind: the network does not take them
        return False
    return True


def varying_axes(tensor: Tensor) -> list[int]:
    """The axes along which inputs of this kind have several lengths: those of tokens and masks, and
    the positions of sequences (N, length, features)."""
    if tensor.dim() > 1 and not tensor.is_floating_point() and not tensor.is_complex():
        return list(range(1, tensor.dim()))
    if tensor.dim() == 3:
        return [1]
    return []


def _together(inputs: Tensor) -> list[list[Axis]]:
    """The axes that change together, of all inputs."""
    named = {"": inputs}
    if isinstance(inputs, Several):
        named = tensors(inputs)
    by_size: dict[int, set[Axis]] = {}
    for tensor in named.values():
        for axis, size in enumerate(tensor.shape):
            if axis > 0 and size > 1:
                by_size.setdefault(size, set()).add((axis, size))
    found = [sorted(axes) for axes in by_size.values()]
    apart = [[axis] for axes in found for axis in axes if len(axes) > 1]
    return [*found, *apart]


def _halved(axes: list[Axis], tensor: Tensor) -> Tensor:
    for axis, size in axes:
        if axis < tensor.dim() and tensor.shape[axis] == size:
            tensor = tensor.narrow(axis, 0, size // 2)
    return tensor


def _shortened(axes: list[Axis], tensor: Tensor) -> Tensor:
    for axis, size in axes:
        if axis < tensor.dim() and tensor.shape[axis] == size:
            tensor = tensor.narrow(axis, 0, size - 1)
    return tensor


def _doubled(axes: list[Axis], tensor: Tensor) -> Tensor:
    for axis, size in axes:
        if axis < tensor.dim() and tensor.shape[axis] == size:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor
