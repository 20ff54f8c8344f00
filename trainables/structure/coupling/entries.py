"""Operations that act on each entry for itself, or move entries about."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.structure.coupling.known import Known, compressed
from slimfront.trainables.structure.coupling.walk import (
    Call,
    Handler,
    Walk,
    found_in,
    mapped_known,
)
from slimfront.trainables.structure.graph import submodule
from slimfront.trainables.torch_internals import function_name

UNARY = (
    *("relu", "relu6", "elu", "gelu", "silu", "mish", "selu", "celu", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "softplus", "softsign", "sigmoid", "tanh", "logsigmoid", "exp"),
    *("log", "sqrt", "rsqrt", "abs", "neg", "square", "reciprocal", "sin", "cos", "erf", "round"),
    *("floor", "ceil", "sign", "clone", "detach", "contiguous", "to", "float", "double", "half"),
    *("type", "bfloat16", "_to_copy", "alias", "dropout", "feature_dropout", "alpha_dropout"),
    *("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "hardshrink", "softshrink"),
    *("tanhshrink", "threshold", "clamp_min", "clamp_max", "nan_to_num", "logical_not", "bool"),
    *("isnan", "isinf", "zeros_like", "ones_like", "full_like", "expm1", "log1p", "atan", "pos"),
    *("positive", "type_as", "lift_fresh_copy", "identity", "rrelu", "native_dropout"),
)
"""Functions and methods of one tensor, entry by entry."""
_UNARY_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold, nn.RReLU),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
)
_ALL_ZERO = ("add", "sub", "rsub", "maximum", "minimum", "where", "lerp", "hypot", "fmax", "fmin")
_ANY_ZERO = ("mul", "multiply", "logical_and", "and", "bitwise_and")
_FIRST_ZERO = ("div", "truediv", "true_divide", "divide", "floordiv", "floor_divide", "fmod", "mod")
_FIRST_ZERO_TOO = ("remainder",)
_OTHERS = (
    *("pow", "eq", "ne", "lt", "le", "gt", "ge", "masked_fill", "logical_or", "or", "xor", "clamp"),
    *(
        "addcmul",
        "addcdiv",
        "atan2",
        "subtract",
        "float_power",
        "clip",
        "logical_xor",
        "bitwise_or",
    ),
)
POINTWISE = (*_ALL_ZERO, *_ANY_ZERO, *_FIRST_ZERO, *_FIRST_ZERO_TOO, *_OTHERS)
"""Functions and methods of several tensors, which broadcast."""
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
_PADDING_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
_MOVING_MODULES: tuple[type[nn.Module], ...] = (
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


def called(walk: Walk, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a node computes for these arguments."""
    if node.op == "call_module":
        return submodule(walk.graph, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def unary(walk: Walk, call: Call) -> Any:
    """The same units; zeros stay where the operation makes 0 of 0."""
    known, rest = call.args[0], _without_known(call.args[1:])

    def of_zeros(zeros: Tensor) -> Any:
        return called(walk, call.node, [zeros, *rest], call.kwargs)

    keeps = walk.zero_of(of_zeros, known.dim)
    return Known(known.shape, known.unit_maps, known.zero if keeps else None)


def _without_known(args: Sequence[Any]) -> list[Any]:
    """Arguments with a number in the place of a tensor."""
    return [mapped_known(argument, _number) for argument in args]


def _number(known: Known) -> Tensor:
    return torch.zeros([1] * known.dim)


def pointwise(walk: Walk, call: Call) -> Any:
    """Units of all sides, which go together; the name of the operation says where it makes 0."""
    sides = list(found_in((call.args, call.kwargs)))
    shape = torch.broadcast_shapes(*(side.shape for side in sides))
    known = Known(shape, joined(walk, sides, shape))
    operands = [*call.args, *(v for v in call.kwargs.values() if isinstance(v, Known))]
    return known.with_zero(_zeros(function_name(call.node), operands, call.kwargs, len(shape)))


def joined(walk: Walk, sides: Sequence[Known], shape: torch.Size) -> tuple[Tensor, ...]:
    """The unit maps of tensors that are broadcast against each other."""
    lined_up = [_lined_up(side, len(shape)) for side in sides]
    unit_maps = [unit_map for side in lined_up for unit_map in side.unit_maps]
    for axis in range(len(shape)):
        if shape[axis] == 1:
            continue
        full = [side for side in lined_up if side.shape[axis] > 1]
        if any(not side.along(axis) for side in full):
            why = "it meets what has no units"
            after = [walk.all_or_none(unit_map, axis, why) for unit_map in unit_maps]
            unit_maps = [unit_map for unit_map in after if unit_map is not None]
            lined_up = [_without_axis(walk, side, axis) for side in lined_up]
    return walk.apart(unit_maps)


def _without_axis(walk: Walk, side: Known, axis: int) -> Known:
    after = [
        walk.all_or_none(unit_map, axis, "it meets what has no units")
        for unit_map in side.unit_maps
    ]
    return Known(
        side.shape, tuple(unit_map for unit_map in after if unit_map is not None), side.zero
    )


def _lined_up(side: Known, dim: int) -> Known:
    """A tensor with axes of size 1 in front."""
    front = [1] * (dim - side.dim)
    shape = torch.Size([*front, *side.shape])
    unit_maps = tuple(unit_map.reshape(*front, *unit_map.shape) for unit_map in side.unit_maps)
    zero = None if side.zero is None else side.zero.reshape(*front, *side.zero.shape)
    return Known(shape, unit_maps, zero)


def _zeros(name: str, operands: list[Any], kwargs: dict[str, Any], dim: int) -> Tensor | None:
    """Where the result of an operation is 0; None where that is not known."""
    if name == "where":
        operands = operands[1:]
    sides = [_zero_of_operand(operand, dim) for operand in operands]
    if kwargs.get("alpha", 1) == 0 or not sides:
        return None
    if name in _ALL_ZERO:
        return _combined(sides, torch.logical_and)
    if name in _ANY_ZERO:
        return _combined(sides, torch.logical_or)
    if name in (*_FIRST_ZERO, *_FIRST_ZERO_TOO):
        return sides[0]
    if name == "pow" and isinstance(operands[1], int | float) and operands[1] > 0:
        return sides[0]
    if name == "masked_fill" and operands[2] == 0:
        return sides[0]
    return None


def _zero_of_operand(operand: Any, dim: int) -> Tensor:
    if isinstance(operand, Known):
        return _lined_up(operand, dim).zeros()
    return torch.full([1] * dim, isinstance(operand, int | float) and operand == 0)


def _combined(sides: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    found = sides[0]
    for side in sides[1:]:
        found = combine(found, side)
    return found


def move(walk: Walk, call: Call) -> Any:
    """The units of the entries, where they come to stand; of several outputs, of each."""
    known = call.args[0]
    if isinstance(known, list | tuple | dict) and call.node.target is operator.getitem:
        return known[call.args[1]]
    like = function_name(call.node).endswith("_as")
    for index in found_in((list(call.args[1:]), call.kwargs)):
        if index.value is None and not like:
            return NotImplemented
        for unit_map in () if like else index.unit_maps:
            walk.units.keep(unit_map, "it is an index")
    for axis in _indexed(known, call.args[1:], call.kwargs):
        for unit_map in known.along(axis):
            walk.units.keep(unit_map, "they are chosen by index")
    rest = mapped_known(list(call.args[1:]), _index)
    named = mapped_known(call.kwargs, _index)
    made = called(walk, call.node, [torch.zeros(known.shape), *rest], named)
    if isinstance(made, list | tuple):
        numbers = range(len(made))
        return tuple(
            walk.moved(known, _part(walk, call.node, rest, named, number)) for number in numbers
        )
    return walk.moved(known, lambda entries: called(walk, call.node, [entries, *rest], named))


def _indexed(known: Known, rest: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    """The axes along which entries are chosen by an index that is a tensor."""
    if not any(one.value is not None for one in found_in((list(rest), kwargs))):
        return []
    first = rest[0] if rest else None
    if isinstance(first, int) and len(rest) > 1:  # index_select
        return [first % known.dim]
    parts = first if isinstance(first, list | tuple) else [first]
    if any(part is Ellipsis or part is None for part in parts[:-1]):
        return list(range(known.dim))
    return [axis for axis, part in enumerate(parts) if isinstance(part, Known)]


def _index(known: Known) -> Tensor:
    """The value of an index; a tensor of its shape where it has none."""
    return torch.zeros(known.shape) if known.value is None else known.value


def _part(
    walk: Walk, node: fx.Node, rest: list[Any], named: dict[str, Any], number: int
) -> Callable[[Tensor], Tensor]:
    def one(entries: Tensor) -> Tensor:
        part: Tensor = called(walk, node, [entries, *rest], named)[number]
        return part

    return one


def pad(walk: Walk, call: Call) -> Any:
    """Units where they come to stand. What is padded along another axis is of the same unit, and 0
    or another number; along their own axis it is of none."""
    known = call.args[0]
    amounts, value = _padding(walk, call)
    if amounts is None:
        return move(walk, call)
    zero = known.zeros().expand(known.shape).double()
    zero = nn.functional.pad(zero, amounts, value=1.0 if value == 0 else 0.0)
    unit_maps = []
    for unit_map in known.unit_maps:
        own = [
            amount if unit_map.shape[unit_map.dim() - 1 - place // 2] > 1 else 0
            for place, amount in enumerate(amounts)
        ]
        unit_maps.append(nn.functional.pad(unit_map + 1, own) - 1)
    return Known(zero.shape, walk.apart(unit_maps)).with_zero(compressed(zero != 0))


def _padding(walk: Walk, call: Call) -> tuple[list[int] | None, float]:
    """How much is padded on each side, the last axis first, and with what number; None where that
    is another entry."""
    if call.node.op == "call_module":
        module: Any = submodule(walk.graph, call.name)
        return list(module.padding), float(getattr(module, "value", 0.0))
    amounts = list(call.argument(1, "pad"))
    if function_name(call.node) == "constant_pad_nd":
        return amounts, float(call.argument(2, "value", 0.0))
    if call.argument(2, "mode", "constant") != "constant":
        return None, 0.0
    return amounts, float(call.argument(3, "value") or 0.0)


def cat(walk: Walk, call: Call) -> Any:
    """Units one after another along the axis, and tied along the others."""
    parts = list(call.args[0])
    axis = call.argument(1, "dim", call.kwargs.get("axis", 0)) % parts[0].dim
    return _one_after_another(walk, parts, axis)


def _one_after_another(walk: Walk, parts: list[Known], axis: int) -> Known:
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    rest = [_without_axis_units(walk, part, axis) for part in parts]
    wide = torch.Size([*shape[:axis], 1, *shape[axis + 1 :]])
    beside = joined(walk, [Known(wide, part.unit_maps) for part in rest], wide)
    own = [_along_cat(part, axis) for part in parts]
    unit_maps = list(beside)
    if any(units is not None for units in own):
        filled = [
            units if units is not None else torch.full((part.shape[axis],), -1)
            for units, part in zip(own, parts, strict=True)
        ]
        view = [1] * len(shape)
        view[axis] = -1
        unit_maps.append(torch.cat(filled).reshape(view))
    zero = torch.cat([part.zeros().expand(part.shape) for part in parts], axis)
    known = Known(torch.Size(shape), walk.apart(unit_maps))
    return known.with_zero(compressed(zero) if bool(zero.any()) else None)


def _without_axis_units(walk: Walk, part: Known, axis: int) -> Known:
    """A part without the units that vary along the axis alone; those of others too go as a whole
    there."""
    unit_maps = []
    for unit_map in part.unit_maps:
        if unit_map.shape[axis] == 1:
            unit_maps.append(unit_map)
        elif unit_map.numel() > unit_map.shape[axis]:
            left = walk.all_or_none(unit_map, axis, "it is joined with others")
            unit_maps += [] if left is None else [left]
    return Known(part.shape, tuple(unit_maps))


def _along_cat(part: Known, axis: int) -> Tensor | None:
    """The units along the axis alone, (size,)."""
    alone = [c for c in part.unit_maps if c.shape[axis] > 1 and c.numel() == c.shape[axis]]
    return alone[0].reshape(-1) if alone else None


def stack(walk: Walk, call: Call) -> Any:
    """As a concatenation along a new axis."""
    parts = list(call.args[0])
    axis = call.argument(1, "dim", 0) % (parts[0].dim + 1)
    wider = [walk.moved(part, lambda entries: entries.unsqueeze(axis)) for part in parts]
    return _one_after_another(walk, wider, axis)


def glu(walk: Walk, call: Call) -> Any:
    """The first half times what the second half lets through: their units go together."""
    known = call.args[0]
    given = call.argument(1, "dim", -1)
    if call.node.op == "call_module":
        given = submodule(walk.graph, call.name).dim
    axis = given % known.dim
    halves = [walk.moved(known, _half(axis, number)) for number in (0, 1)]
    shape = halves[0].shape
    return Known(shape, joined(walk, halves, shape)).with_zero(halves[0].zero)


def _half(axis: int, number: int) -> Callable[[Tensor], Tensor]:
    return lambda entries: entries.chunk(2, axis)[number]


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), move),
    "stack": stack,
    "glu": glu,
}
MODULES: dict[type[nn.Module], Handler] = {
    **dict.fromkeys(_UNARY_MODULES, unary),
    **dict.fromkeys(_MOVING_MODULES, move),
    **dict.fromkeys(_PADDING_MODULES, pad),
    nn.GLU: glu,
}
