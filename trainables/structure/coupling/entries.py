"""Operations that act on each entry for itself, of one tensor or of several."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.coupling.joining import joined, lined_up
from slimfront.trainables.structure.coupling.known import Known, found_in, mapped_known
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
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
_ALL_ZERO = (
    *("add", "sub", "rsub", "subtract", "maximum", "minimum", "where", "hypot", "fmax", "fmin"),
    *("logical_or", "or", "bitwise_or", "logical_xor", "xor"),
)
_ANY_ZERO = ("mul", "multiply", "logical_and", "and", "bitwise_and")
_FIRST_ZERO = (
    *("div", "truediv", "true_divide", "divide", "floordiv", "floor_divide", "fmod", "mod"),
    "remainder",
)
_OF_THREE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addcmul": lambda added, one, other: added & (one | other),
    "addcdiv": lambda added, above, _: added & above,
    "lerp": lambda start, end, _: start & end,
}
"""Where the result is 0, by where the three operands are."""
_OTHERS = (
    *("pow", "eq", "ne", "lt", "le", "gt", "ge", "masked_fill", "clamp", "atan2", "float_power"),
    "clip",
)
POINTWISE = (*_ALL_ZERO, *_ANY_ZERO, *_FIRST_ZERO, *_OF_THREE, *_OTHERS)
"""Functions and methods of several tensors, which broadcast."""


def unary(walk: Walk, call: Call) -> Any:
    """The same units; zeros stay where the operation makes 0 of 0."""
    known = call.input
    _, *others = call.args
    rest = mapped_known(others, _number)

    def of_zeros(zeros: Tensor) -> Any:
        return walk.called(
            call.node,
            args=[zeros, *rest],
            kwargs=call.kwargs,
        )

    zero = None
    if walk.zero_of(of_zeros, known.dim):
        zero = known.zero
    return Known(
        shape=known.shape,
        unit_maps=known.unit_maps,
        zero=zero,
    )


def _number(known: Known) -> Tensor:
    """A number in the place of a tensor."""
    return torch.zeros([1] * known.dim)


def pointwise(walk: Walk, call: Call) -> Any:
    """Units of all sides, which go together; the name of the operation says where it makes 0."""
    given = (call.args, call.kwargs)
    sides = list(found_in(given))
    shapes = [side.shape for side in sides]
    shape = torch.broadcast_shapes(*shapes)
    unit_maps = joined(walk, sides, shape)
    known = Known(shape, unit_maps)
    if len(sides) == 1:
        return known.with_zero(_zeros_beside_numbers(walk, call, sides[0]))
    zero = _zeros(call, known.dim)
    return known.with_zero(zero)


def _zeros_beside_numbers(walk: Walk, call: Call, side: Known) -> Tensor | None:
    """Where an operation on one tensor and numbers makes 0: where it makes 0 of 0, if at all."""

    def of_zeros(zeros: Tensor) -> Any:
        given = (list(call.args), call.kwargs)
        args, kwargs = mapped_known(given, lambda _: zeros)
        return walk.called(call.node, args, kwargs)

    if walk.zero_of(of_zeros, side.dim):
        return side.zero
    return None


def _zeros(call: Call, dim: int) -> Tensor | None:
    """Where the result of an operation is 0; None where that is not known."""
    name = function_name(call.node)
    operands = list(call.args)
    for value in call.kwargs.values():
        if isinstance(value, Known):
            operands.append(value)
    if name == "where":  # its first operand only chooses
        operands = operands[1:]
    zeros = []
    for operand in operands:
        zeros.append(_zeros_of(operand, dim))
    factor = call.kwargs.get("alpha", 1)
    if factor == 0 or not zeros:
        return None
    if name in _OF_THREE and len(zeros) == 3:
        return _OF_THREE[name](*zeros)
    if name in _ALL_ZERO:
        return functools.reduce(torch.logical_and, zeros)
    if name in _ANY_ZERO:
        return functools.reduce(torch.logical_or, zeros)
    if _keeps_zeros_of_first(name, operands):
        return zeros[0]
    return None


def _keeps_zeros_of_first(name: str, operands: list[Any]) -> bool:
    """Whether an operation makes 0 where its first operand is 0, whatever the others are there."""
    if name in _FIRST_ZERO:
        return True
    if name == "masked_fill":
        filling = operands[2]
        return bool(filling == 0)
    return False


def _zeros_of(operand: Any, dim: int) -> Tensor:
    """Which entries of an operand are 0, of `dim` axes."""
    if isinstance(operand, Known):
        known = lined_up(operand, dim)
        return known.zeros()
    is_zero = False
    if isinstance(operand, int | float):
        is_zero = operand == 0
    return torch.full([1] * dim, is_zero)


def glu(walk: Walk, call: Call) -> Any:
    """The first half times what the second half lets through: their units go together."""
    known = call.input
    module = walk.module(call.node)
    axis = call.argument(1, "dim", -1)
    if module is not None:
        axis = module.dim

    def first_half(entries: Tensor) -> Tensor:
        half, _ = entries.chunk(2, axis)
        return half

    def second_half(entries: Tensor) -> Tensor:
        _, half = entries.chunk(2, axis)
        return half

    first = walk.moved(known, first_half)
    second = walk.moved(known, second_half)
    unit_maps = joined(walk, [first, second], first.shape)
    made = Known(first.shape, unit_maps)
    return made.with_zero(first.zero)


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(POINTWISE, pointwise),
    "glu": glu,
}
MODULES: dict[type[nn.Module], Handler] = {
    **dict.fromkeys(_UNARY_MODULES, unary),
    nn.GLU: glu,
}
