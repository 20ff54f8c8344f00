"""Operations that mix entries along axes of one tensor: sums and means, softmax, norms, pooling."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from slimfront.trainables.structure.coupling.joining import joined, lined_up
from slimfront.trainables.structure.coupling.known import Known, varying
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.torch_internals import function_name

_SUMS = ("sum", "mean", "norm", "linalg_vector_norm", "vector_norm")
"""What leaves zeros out of account, but for how many there are."""
_NORMS = ("norm", "linalg_vector_norm", "vector_norm")
_REDUCE = (*_SUMS, "amax", "amin", "var", "std", "prod", "logsumexp", "all", "any")
_ZERO_OF_ZEROS = (*_SUMS, "amax", "amin")
_KEEP_SHAPE = ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "softmin")
_POOLS = tuple(
    f"{kind}_pool{n}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for n in (1, 2, 3)
)
_RESIZE = (
    *("interpolate", "upsample", "upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d"),
    *("upsample_bicubic2d", "upsample_linear1d", "_upsample_nearest_exact2d", "upsample_nearest3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_trilinear3d"),
)


def reduce(walk: Walk, call: Call) -> Any:
    """A sum or another number over axes; where it is over units, zeros can go from a sum."""
    known = call.input
    name = function_name(call.node)
    return _reduced(walk, call, known, name)


def extreme(walk: Walk, call: Call) -> Any:
    """The largest or smallest of all, or along an axis, with its place there."""
    others = [
        value for value in (*call.args[1:], *call.kwargs.values()) if isinstance(value, Known)
    ]
    if others:
        return NotImplemented
    made = walk.made[call.node]
    name = f"a{function_name(call.node)}"
    found = _reduced(walk, call, call.input, name)
    if isinstance(made, Known):
        return found
    return found, Known(found.shape, found.unit_maps)


def _reduced(walk: Walk, call: Call, known: Known, name: str) -> Known:
    """A number over axes, by the name of what it is."""
    axes = _axes(call, name)
    unit_maps: list[Tensor] = []
    for unit_map in known.unit_maps:
        mixed = varying(unit_map) & set(axes)
        can_be_summed = name in _SUMS and _is_of_one_axis(unit_map)
        if mixed and can_be_summed:
            _read_sum(walk, call.node, known, unit_map)
            continue
        unit_maps += _left_of(
            walk,
            call,
            unit_maps=[unit_map],
            mixed=sorted(mixed),
        )
    shape = list(known.shape)
    for axis in axes:
        shape[axis] = 1
    made = Known(
        shape=torch.Size(shape),
        unit_maps=tuple(unit_maps),
    )
    if name in _ZERO_OF_ZEROS:
        zero = known.zero_over(axes)
        made = made.with_zero(zero)
    if _keeps_axes(call, name):
        return made

    def squeezed(entries: Tensor) -> Tensor:
        return entries.squeeze(tuple(axes))

    return walk.moved(made, squeezed)


def _left_of(
    walk: Walk, call: Call, unit_maps: Iterable[Tensor], mixed: Sequence[int]
) -> tuple[Tensor, ...]:
    """The unit maps that are left where a call mixes entries along axes."""
    return walk.left_of(
        unit_maps,
        axes=mixed,
        why=f"'{call.node.name}' mixes them along their axis",
    )


def _is_of_one_axis(unit_map: Tensor) -> bool:
    return len(varying(unit_map)) == 1


def _read_sum(walk: Walk, node: Node, known: Known, unit_map: Tensor) -> None:
    """Notes that a sum or mean reads units, which vary along one axis."""
    units = unit_map.reshape(-1)
    (axis,) = varying(unit_map)
    zero_in = known.zero_along(axis)
    walk.units.read(units, zero_in)
    if function_name(node) == "mean":
        walk.count(node.name, axis, units)


def _after_input(call: Call, name: str) -> list[Any]:
    """The arguments by place from the axes on: in front of those is the input, and for a norm its
    order."""
    if name in _NORMS:
        return list(call.args[2:])
    return list(call.args[1:])


def _axes(call: Call, name: str) -> list[int]:
    """The axes that are reduced."""
    dim = call.input.dim
    axes = None
    rest = _after_input(call, name)
    if rest:
        axes = rest[0]
    for keyword in ("axis", "dim"):
        axes = call.kwargs.get(keyword, axes)
    if axes is None or axes == []:
        return list(range(dim))
    if isinstance(axes, int):
        axes = [axes]
    return [axis % dim for axis in axes]


def _keeps_axes(call: Call, name: str) -> bool:
    """Whether the axes that are reduced stay with size 1."""
    keeps = False
    rest = _after_input(call, name)
    place = 1
    if name in ("var", "std") and len(rest) > 1:  # in front is a correction
        place = 2
    if len(rest) > place:
        keeps = rest[place]
    return bool(call.kwargs.get("keepdim", keeps))


def along_axis(walk: Walk, call: Call) -> Any:
    """Softmax and the like: what is along the axis goes as a whole or not at all."""
    known = call.input
    module = walk.module(call.node)
    axis = getattr(module, "dim", None)
    if axis is None:
        axis = call.argument(1, "dim")
    if axis is None:
        return NotImplemented
    left = _left_of(walk, call, known.unit_maps, [axis])
    made = Known(known.shape, left)
    if function_name(call.node) == "cumsum":
        return made.with_zero(known.zero_over([axis]))
    return made


def normalise(walk: Walk, call: Call) -> Any:
    """Divides by the norm along an axis, for which zeros count nothing."""
    known = call.input
    given_axis = call.argument(2, "dim", 1)
    axis = given_axis % known.dim
    for unit_map in known.along(axis):
        if not _is_of_one_axis(unit_map):
            return NotImplemented
        units = unit_map.reshape(-1)
        zero_in = known.zero_along(axis)
        walk.units.read(units, zero_in)
    return known


def pool(walk: Walk, call: Call) -> Any:
    """Pooling and resizing: channels for themselves, positions mixed."""
    known = call.input
    first = _first_position(walk, call.node, known)
    positions = range(first, known.dim)
    left = _left_of(walk, call, known.unit_maps, positions)
    shape = walk.shape_of(call.node)
    if shape is None:
        return NotImplemented
    made = Known(shape, left)
    zero = known.zero_over(positions)
    return made.with_zero(zero)


def instance_norm(walk: Walk, call: Call) -> Any:
    """Each channel for itself, by a function without parameters; one that is 0 stays so."""
    known = call.input
    given = [value for value in (*call.args[1:], *call.kwargs.values()) if isinstance(value, Known)]
    if given:
        return NotImplemented
    positions = range(2, known.dim)
    left = _left_of(walk, call, known.unit_maps, positions)
    made = Known(known.shape, left)
    return made.with_zero(known.zero_over(positions))


def layer_norm(walk: Walk, call: Call) -> Any:
    """A layer norm over the last axis by a function: channels that are 0 count, and can go once a
    module that knows how many there were is in its place."""
    given = call.named("input", "normalized_shape", "weight", "bias", "eps")
    known = given["input"]
    last = known.last_axis
    if len(given["normalized_shape"]) != 1:
        return NotImplemented
    for unit_map in known.along(last):
        if not _is_of_one_axis(unit_map):
            return NotImplemented
        walk.units.read(unit_map.reshape(-1), known.zero_along(last))
    factors = [given.get(name) for name in ("weight", "bias")]
    sides = [side for side in factors if isinstance(side, Known)]
    made = Known(known.shape, joined(walk, [known, *sides], known.shape))
    if not isinstance(given.get("weight"), Known):
        return made
    zeros = [lined_up(side, known.dim).zeros() for side in sides]
    return made.with_zero(functools.reduce(torch.logical_and, zeros))


def _first_position(walk: Walk, node: Node, known: Known) -> int:
    """The first axis of positions: a pool's number of them is in its name."""
    module = walk.module(node)
    name = function_name(node)
    if module is not None:
        name = type(module).__name__
    for axes in (1, 2, 3):
        if f"{axes}d" in name.lower():
            return known.dim - axes
    return 2


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(_KEEP_SHAPE, along_axis),
    **dict.fromkeys((*_POOLS, *_RESIZE), pool),
    **dict.fromkeys(("max", "min"), extreme),
    "normalize": normalise,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
}
_POOL_MODULES: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, f"{kind}Pool{n}d")
    for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "LP")
    for n in (1, 2, 3)
)
MODULES: dict[type[nn.Module], Handler] = {
    **dict.fromkeys((*_POOL_MODULES, nn.Upsample), pool),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), pool),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin), along_axis),
}
