"""Operations that move, repeat, leave out or pad entries, or make some of one number."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from slimfront.trainables.structure.coupling.known import (
    Known,
    along,
    compressed,
    found_in,
    mapped_known,
)
from slimfront.trainables.structure.coupling.walk import BATCH, Call, Handler, Walk
from slimfront.trainables.torch_internals import function_name

MOVES = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "swapdims"),
    *("t", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "broadcast_to", "getitem"),
    *("narrow", "select", "slice", "index_select", "roll", "flip", "repeat", "tile", "split"),
    *(
        "repeat_interleave",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "unfold",
        "adjoint",
    ),
    *("chunk", "unbind", "tensor_split", "split_with_sizes", "_unsafe_view"),
    *("native_channel_shuffle", "ravel", "view_copy", "mT", "T", "diagonal", "rot90"),
    *("index", "tril", "triu", "unsafe_chunk", "unsafe_split"),
)
"""What only moves, repeats or leaves out entries."""
PARTS = (
    *("getitem", "narrow", "select", "slice", "index_select", "index", "diagonal", "tril", "triu"),
    *("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"),
)
"""What leaves out entries, or parts them."""
SPREADS = ("expand", "broadcast_to")
"""What repeats entries along axes, of sizes that it is given."""
FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
"""What makes a tensor of one number."""
_OF_SEVERAL = ("values", "indices")
"""By which names the tensors are known that a maximum along an axis makes."""
_PADDING_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
MOVING_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(
        nn.ReflectionPad1d,
        nn.ReflectionPad2d,
        nn.ReflectionPad3d,
        nn.ReplicationPad1d,
        nn.ReplicationPad2d,
        nn.ReplicationPad3d,
    ),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)


def move(walk: Walk, call: Call) -> Any:
    """The units of the entries, where they come to stand; of several outputs, of each."""
    known, *rest = call.args
    is_item = call.node.target is operator.getitem
    if is_item and isinstance(known, list | tuple | dict):
        (item,) = rest
        return known[item]
    name = function_name(call.node)
    if not name.endswith("_as"):  # which is given a tensor for its shape
        for index in found_in((rest, call.kwargs)):
            if index.value is None:
                return NotImplemented
            walk.stay(index, "it is an index")
    _keep_indexed(walk, call)
    moving = _moving(walk, call)
    if name in PARTS:
        _keep_read_elsewhere(walk, call, moving)
    made = moving(torch.zeros(known.shape))
    if not isinstance(made, list | tuple):
        moved = walk.moved(known, moving)
        is_constant = known.value is not None
        if is_constant and name in SPREADS:
            return _spread(walk, call, known, moved)
        return moved
    found = []
    for number in range(len(made)):
        part = _part_of(moving, number)
        found.append(walk.moved(known, part))
    return tuple(found)


def attribute(walk: Walk, call: Call) -> Any:
    """What an attribute of a tensor, or of several, is: moved, one of them, or the same."""
    known, name = call.args[:2]
    if name in _OF_SEVERAL and isinstance(known, tuple):
        return known[_OF_SEVERAL.index(name)]
    if name in ("T", "mT"):
        return walk.moved(known, lambda entries: getattr(entries, name))
    if name == "data":
        return known
    return NotImplemented


def _spread(walk: Walk, call: Call, known: Known, moved: Known) -> Known:
    """A constant that is repeated as often as there are channels: each repetition is a unit, which
    goes with what it meets."""
    new_axes = moved.dim - known.dim
    sizes = sizes_in(call.node.args[1:])
    unit_maps = list(moved.unit_maps)
    for axis, size in enumerate(moved.shape):
        was_there = axis >= new_axes and known.shape[axis - new_axes] > 1
        if size <= 1 or was_there:
            continue
        given = sizes[axis]
        follows_batch = not isinstance(given, int) and size == BATCH
        if not follows_batch and not walk.varies(given):
            units = walk.units.fresh(size)
            unit_maps.append(along(units, axis, moved.dim))
    return replace(moved, unit_maps=tuple(unit_maps))


def sizes_in(arguments: Sequence[Any]) -> list[Any]:
    """The sizes among arguments, where they stand one by one or in a list."""
    first = arguments[0]
    if isinstance(first, list | tuple):
        return list(first)
    return list(arguments)


def filled(walk: Walk, call: Call) -> Any:
    """A tensor of one number: along each axis whose size the code names, its entries are units,
    which go with what they meet."""
    name = function_name(call.node)
    made = walk.made[call.node]
    arguments = call.node.args
    if name.startswith("new_"):
        arguments = arguments[1:]
    if not arguments:
        return made
    sizes = sizes_in(arguments)
    unit_maps = []
    for axis, size in enumerate(sizes[: made.dim]):
        if isinstance(size, int) and size > 1:
            units = walk.units.fresh(size)
            unit_maps.append(along(units, axis, made.dim))
    found = Known(made.shape, tuple(unit_maps))
    if not name.endswith("zeros"):
        return found
    return found.with_zero(torch.ones([1] * made.dim, dtype=torch.bool))


def _keep_indexed(walk: Walk, call: Call) -> None:
    """Has units stay along axes where entries are chosen by an index that is a tensor."""
    known, *rest = call.args
    indices = found_in((rest, call.kwargs))
    if all(index.value is None for index in indices):
        return
    for axis in _indexed(known, rest):
        for unit_map in known.along(axis):
            walk.units.keep(unit_map, "they are chosen by index")


def _keep_read_elsewhere(walk: Walk, call: Call, moving: Callable[[Tensor], Any]) -> None:
    """Has all units stay of which inputs of other sizes read others than those at hand: positions
    of a table, say."""
    source = call.node.args[0]
    numbers = [node for node in call.node.all_input_nodes if walk.varies(node) and node != source]
    if not numbers or not isinstance(source, Node):
        return
    for there in walk.elsewhere:
        given = {node: there[node] for node in call.node.all_input_nodes}
        before = (call.node.args[1:], call.node.kwargs)
        args, kwargs = fx.node.map_arg(before, given.__getitem__)
        shape = given[source].shape

        def moving_there(entries: Tensor, args: Any = args, kwargs: Any = kwargs) -> Any:
            return walk.called(
                call.node,
                args=[entries, *mapped_known(args, _index)],
                kwargs=mapped_known(kwargs, _index),
            )

        for unit_map in call.input.unit_maps:
            here = _read(moving(unit_map.expand(call.input.shape).double()))
            if _fits(unit_map, shape):
                elsewhere = _read(moving_there(unit_map.expand(shape).double()))
                if torch.equal(here, elsewhere):
                    continue
            walk.units.keep(unit_map, "inputs of other sizes read others")


def _fits(unit_map: Tensor, shape: torch.Size) -> bool:
    """Whether units are of the entries of a tensor of this shape."""
    sizes = zip(unit_map.shape, shape, strict=True)
    return all(own in (1, size) for own, size in sizes)


def _read(moved: Any) -> Tensor:
    """The numbers of all units in what was moved."""
    pieces = [moved]
    if isinstance(moved, list | tuple):
        pieces = list(moved)
    numbers: Tensor = torch.cat([piece.reshape(-1) for piece in pieces]).unique()
    return numbers


def _indexed(known: Known, rest: list[Any]) -> Iterator[int]:
    """The axes along which entries are chosen."""
    if not rest:
        return
    index = rest[0]
    is_axis = isinstance(index, int) and len(rest) > 1  # of index_select
    if is_axis:
        yield index % known.dim
        return
    parts = [index]
    if isinstance(index, list | tuple):
        parts = list(index)
    for part in parts[:-1]:
        if part is Ellipsis or part is None:  # what is behind it is not of the axis of its place
            yield from range(known.dim)
            return
    for axis, part in enumerate(parts):
        if isinstance(part, Known):
            yield axis


def _moving(walk: Walk, call: Call) -> Callable[[Tensor], Any]:
    """What a call makes of a tensor in the place of the first that it is given."""
    _, *others = call.args
    rest = mapped_known(others, _index)
    kwargs = mapped_known(call.kwargs, _index)

    def moving(entries: Tensor) -> Any:
        return walk.called(
            call.node,
            args=[entries, *rest],
            kwargs=kwargs,
        )

    return moving


def _index(known: Known) -> Tensor:
    """The value of an index; a tensor of its shape where it has none."""
    if known.value is None:
        return torch.zeros(known.shape)
    return known.value


def _part_of(moving: Callable[[Tensor], Any], number: int) -> Callable[[Tensor], Tensor]:
    """One of the outputs of a move that makes several."""

    def moved(entries: Tensor) -> Tensor:
        part: Tensor = moving(entries)[number]
        return part

    return moved


def pad(walk: Walk, call: Call) -> Any:
    """Units where they come to stand. What is padded along another axis is of the same unit, and 0
    or another number; along their own axis it is of none."""
    known = call.input
    amounts, value = _padding(walk, call)
    if amounts is None:
        return move(walk, call)
    zero = known.zeros().expand(known.shape)
    padded = nn.functional.pad(
        zero.double(),
        pad=amounts,
        value=float(value == 0),
    )
    unit_maps = []
    for unit_map in known.unit_maps:
        own = _along_varying(amounts, unit_map)
        # From 1 on: what is padded with 0 is of no unit.
        wider = nn.functional.pad(unit_map + 1, own)
        unit_maps.append(wider - 1)
    made = Known(
        shape=padded.shape,
        unit_maps=walk.apart(unit_maps),
    )
    zeros = padded != 0
    return made.with_zero(compressed(zeros))


def _along_varying(amounts: list[int], unit_map: Tensor) -> list[int]:
    """How much is padded before and behind, the last axis first, but only along axes along which
    units vary."""
    found = []
    for place, amount in enumerate(amounts):
        axes_behind = place // 2
        axis = unit_map.dim() - 1 - axes_behind
        if unit_map.shape[axis] > 1:
            found.append(amount)
        else:
            found.append(0)
    return found


def _padding(walk: Walk, call: Call) -> tuple[list[int] | None, float]:
    """How much is padded on each side, the last axis first, and with what number; None where that
    is another entry."""
    module = walk.module(call.node)
    if module is not None:
        value = getattr(module, "value", 0.0)
        return list(module.padding), float(value)
    amounts = list(call.argument(1, "pad"))
    if function_name(call.node) == "constant_pad_nd":
        value = call.argument(2, "value", 0.0)
        return amounts, float(value)
    mode = call.argument(2, "mode", "constant")
    if mode != "constant":
        return None, 0.0
    value = call.argument(3, "value")
    if value is None:
        return amounts, 0.0
    return amounts, float(value)


MAKERS: dict[str, Handler] = dict.fromkeys(FILLS, filled)
FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), move),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "getattr": attribute,
}
MODULES: dict[type[nn.Module], Handler] = {
    **dict.fromkeys(MOVING_MODULES, move),
    **dict.fromkeys(_PADDING_MODULES, pad),
}
