"""Tensors that meet: broadcast against each other, or one after another."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.structure.coupling.known import Known, along, compressed
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk


def joined(walk: Walk, sides: Sequence[Known], shape: torch.Size) -> tuple[Tensor, ...]:
    """The unit maps of tensors that are broadcast against each other."""
    dim = len(shape)
    all_sides = [lined_up(side, dim) for side in sides]
    unit_maps: list[Tensor] = []
    for side in all_sides:
        unit_maps += side.unit_maps
    for axis in range(dim):
        if _all_have_units(all_sides, axis):
            continue
        unit_maps = _left_of(walk, unit_maps, axis)
        left = []
        for side in all_sides:
            own = _left_of(walk, side.unit_maps, axis)
            side_left = replace(side, unit_maps=tuple(own))
            left.append(side_left)
        all_sides = left
    return walk.apart(unit_maps)


def _left_of(walk: Walk, unit_maps: Iterable[Tensor], axis: int) -> list[Tensor]:
    """The unit maps that are left where those along an axis go as a whole."""
    left = walk.left_of(
        unit_maps,
        axes=[axis],
        why="it meets what has no units",
    )
    return list(left)


def _all_have_units(sides: list[Known], axis: int) -> bool:
    """Whether all tensors that are not broadcast along an axis have units along it."""
    for side in sides:
        if side.shape[axis] <= 1:
            continue
        if not side.along(axis):
            return False
    return True


def lined_up(side: Known, dim: int) -> Known:
    """A tensor with axes of size 1 in front, so that it has `dim` axes."""
    front = [1] * (dim - side.dim)

    def reshaped(tensor: Tensor) -> Tensor:
        return tensor.reshape(*front, *tensor.shape)

    unit_maps = [reshaped(unit_map) for unit_map in side.unit_maps]
    zero = side.zero
    if zero is not None:
        zero = reshaped(zero)
    return Known(
        shape=torch.Size([*front, *side.shape]),
        unit_maps=tuple(unit_maps),
        zero=zero,
    )


def cat(walk: Walk, call: Call) -> Any:
    """Units one after another along the axis, and tied along the others."""
    parts = list(call.input)
    dim = parts[0].dim
    named = call.kwargs.get("axis", 0)
    axis = call.argument(1, "dim", named)
    return _one_after_another(walk, parts, axis % dim)


def stack(walk: Walk, call: Call) -> Any:
    """As a concatenation along a new axis."""
    parts = list(call.input)
    dim = parts[0].dim + 1
    axis = call.argument(1, "dim", 0) % dim

    def widened(entries: Tensor) -> Tensor:
        return entries.unsqueeze(axis)

    wider = [walk.moved(part, widened) for part in parts]
    return _one_after_another(walk, wider, axis)


def written_into(walk: Walk, call: Call) -> Any:
    """A tensor with another in the place of a part of it: what is in front of the part, the other,
    and what is behind it, one after another."""
    given = call.named("input", "src", "dim", "start", "end", "step")
    into = given["input"]
    axis = given.get("dim", 0) % into.dim
    if given.get("step", 1) != 1:
        return NotImplemented
    bounds = slice(given.get("start"), given.get("end"))
    start, end, _ = bounds.indices(into.shape[axis])
    return _written_between(walk, into, given["src"], axis, start, end)


def written_at(walk: Walk, call: Call) -> Any:
    """The same of one place along an axis."""
    given = call.named("input", "src", "dim", "index")
    into = given["input"]
    axis = given["dim"] % into.dim
    place = given["index"] % into.shape[axis]
    part = walk.moved(given["src"], lambda entries: entries.unsqueeze(axis))
    return _written_between(walk, into, part, axis, place, place + 1)


def _written_between(
    walk: Walk, into: Known, part: Known, axis: int, start: int, end: int
) -> Known:
    size = into.shape[axis]
    for side in (into, part):
        walk.units.keep_all(side.along(axis), "a part of them is written anew")
    parts = []
    for first, last in ((0, start), (end, size)):
        parts.append(_narrowed(walk, into, axis, first, last))
    in_front, behind = parts
    in_order = [each for each in (in_front, part, behind) if each.shape[axis]]
    return _one_after_another(walk, in_order, axis)


def _narrowed(walk: Walk, known: Known, axis: int, first: int, last: int) -> Known:
    """What lies between two places along an axis."""
    return walk.moved(known, lambda entries: entries.narrow(axis, first, last - first))


def _one_after_another(walk: Walk, parts: list[Known], axis: int) -> Known:
    """What is known of tensors that are put one after another along an axis."""
    sizes = list(parts[0].shape)
    sizes[axis] = 1
    narrow = torch.Size(sizes)
    across = []
    zeros = []
    size = 0
    for part in parts:
        size += part.shape[axis]
        unit_maps = _across(walk, part, axis)
        across.append(Known(narrow, unit_maps))
        zero_of_part = part.zeros()
        zeros.append(zero_of_part.expand(part.shape))
    together = joined(walk, across, narrow)
    in_a_row = _in_a_row(parts, axis)
    if in_a_row is not None:
        together = (*together, in_a_row)
    sizes[axis] = size
    known = Known(
        shape=torch.Size(sizes),
        unit_maps=walk.apart(together),
    )
    zero = torch.cat(zeros, axis)
    if not zero.any():
        return known
    return known.with_zero(compressed(zero))


def _across(walk: Walk, part: Known, axis: int) -> tuple[Tensor, ...]:
    """The unit maps of a part without those that vary along the axis alone; those that vary along
    others too go as a whole there."""
    found = []
    for unit_map in part.unit_maps:
        if not _is_only_along(unit_map, axis):
            found.append(unit_map)
    return walk.left_of(
        found,
        axes=[axis],
        why="it is joined with others",
    )


def _in_a_row(parts: list[Known], axis: int) -> Tensor | None:
    """The units of the parts along the axis alone, one after another; None if there are none."""
    rows = []
    any_units = False
    for part in parts:
        size = part.shape[axis]
        row = torch.full((size,), NONE)
        for unit_map in part.unit_maps:
            if _is_only_along(unit_map, axis):
                row = unit_map.reshape(-1)
                any_units = True
                break
        rows.append(row)
    if not any_units:
        return None
    return along(
        torch.cat(rows),
        axis=axis,
        dim=parts[0].dim,
    )


def _is_only_along(unit_map: Tensor, axis: int) -> bool:
    """Whether a unit map varies along this axis and no other."""
    size = unit_map.shape[axis]
    if size == 1:
        return False
    return unit_map.numel() == size


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    "slice_scatter": written_into,
    "select_scatter": written_at,
}
