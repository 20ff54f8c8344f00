"""Moves of whole units along one axis, such as shuffles, rolls and every second channel: what stays
of them is taken by its places."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from slimfront.trainables.compaction.slicing.stays import Slices
from slimfront.trainables.structure.coupling.known import Known


def places_of(slices: Slices, node: Node) -> tuple[int, list[int]] | None:
    """The axis along which a node takes entries, and the places, among what stays of its input, of
    what stays of its output; None if it does anything else."""
    known = slices.known_input(node)
    made = slices.known(node)
    if not (isinstance(known, Known) and isinstance(made, Known)) or known.dim != made.dim:
        return None
    moved = [_moved(slices, node, known, axis) for axis in range(known.dim)]
    if any(one is None for one in moved):
        return None
    taken = [axis for axis, one in enumerate(moved) if not _is_in_order(one, known.shape[axis])]
    if len(taken) != 1:
        return None
    (axis,) = taken
    varies = any(source in slices.by_inputs for source in node.all_input_nodes[1:])
    if varies or not known.along(axis):
        return None  # the places are others for inputs of other sizes
    kept = slices.kept_along(known, axis)
    stays = slices.kept_along(made, axis)
    sources = moved[axis]
    assert sources is not None
    sources = sources[stays]
    if not kept[sources].all():
        return None
    places = kept.cumsum(0) - 1
    return axis, places[sources].tolist()


def _moved(slices: Slices, node: Node, known: Known, axis: int) -> Tensor | None:
    """From which place along an axis each one along it comes, where that is the same whatever the
    places along the others are."""
    size = known.shape[axis]
    shape = [1] * known.dim
    shape[axis] = size
    places = torch.arange(size, dtype=torch.float64).reshape(shape).expand(known.shape)
    rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), lambda one: _value(slices, one))
    try:
        moved = slices.walk.called(node, args=[places, *rest], kwargs=kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    if not isinstance(moved, Tensor) or moved.dim() != known.dim or not moved.numel():
        return None
    along = moved.movedim(axis, 0).flatten(1)
    first = along[:, :1]
    if not torch.equal(along, first.expand_as(along)):
        return None
    return first.squeeze(1).long()


def _is_in_order(places: Tensor | None, size: int) -> bool:
    return places is not None and torch.equal(places, torch.arange(size))


def _value(slices: Slices, node: Node) -> Any:
    known = slices.known(node)
    if not isinstance(known, Known):
        return known
    if known.value is not None:
        return known.value
    return torch.zeros(known.shape)
