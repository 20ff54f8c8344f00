"""Operations that mix entries along an axis: sums and means, softmax, pooling, products of
matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.coupling.entries import joined
from slimfront.trainables.structure.coupling.known import Known, compressed, varying
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.structure.graph import submodule
from slimfront.trainables.torch_internals import OpOverload, function_name

_SUMS = ("sum", "mean", "norm", "linalg_vector_norm", "vector_norm")
"""What leaves zeros out of account, but for how many there are."""
_REDUCE = (*_SUMS, "amax", "amin", "var", "std", "prod", "logsumexp", "all", "any")
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
_MIXED = "'{}' mixes them along their axis"


def reduce(walk: Walk, call: Call) -> Any:
    """A sum or another number over axes; where it is over units, zeros can go from a sum."""
    known = call.args[0]
    name = function_name(call.node)
    axes, keepdim = _axes(name, known, call.args, call.kwargs)
    unit_maps = []
    for unit_map in known.unit_maps:
        mixed = sorted(varying(unit_map) & set(axes))
        if mixed and name in _SUMS and len(varying(unit_map)) == 1:
            _read_sum(walk, call.node, known, unit_map, mixed[0], name)
            continue
        left = walk.all_or_none_of(unit_map, mixed, _MIXED.format(call.node.name))
        unit_maps += [] if left is None else [left]
    zero = None
    if known.zero is not None and name in (*_SUMS, "amax", "amin"):
        zero = known.zero.all(dim=tuple(axes), keepdim=True)
    shape = [1 if axis in axes else size for axis, size in enumerate(known.shape)]
    made = Known(torch.Size(shape), tuple(unit_maps)).with_zero(zero)
    if keepdim:
        return made
    return walk.moved(made, lambda entries: entries.squeeze(tuple(axes)))


def _read_sum(
    walk: Walk, node: fx.Node, known: Known, unit_map: Tensor, axis: int, name: str
) -> None:
    units = unit_map.reshape(-1)
    walk.units.read(units, known.zero_along(axis))
    if name == "mean":
        walk.counts.setdefault(node.name, []).append((axis, units))


def _axes(
    name: str, known: Known, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[int], bool]:
    """The axes that are reduced, and whether they stay with size 1."""
    rest = list(args[1:])
    if name in ("norm", "linalg_vector_norm", "vector_norm"):
        rest = rest[1:]
    dims = kwargs.get("dim", kwargs.get("axis", rest[0] if rest else None))
    keepdim = bool(kwargs.get("keepdim", rest[1] if len(rest) > 1 else False))
    if name in ("var", "std") and len(rest) > 1:
        keepdim = bool(kwargs.get("keepdim", rest[2] if len(rest) > 2 else False))
    if dims is None or dims == []:
        dims = list(range(known.dim))
    wanted = [dims] if isinstance(dims, int) else list(dims)
    return [axis % known.dim for axis in wanted], keepdim


def along_axis(walk: Walk, call: Call) -> Any:
    """Softmax and the like: what is along the axis goes as a whole or not at all."""
    known = call.args[0]
    module = submodule(walk.graph, str(call.node.target)) if call.node.op == "call_module" else None
    axis = getattr(module, "dim", None) if module is not None else None
    if axis is None:
        axis = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    if axis is None:
        return NotImplemented
    why = _MIXED.format(call.node.name)
    after = [walk.all_or_none(unit_map, axis % known.dim, why) for unit_map in known.unit_maps]
    return Known(known.shape, tuple(unit_map for unit_map in after if unit_map is not None))


def normalise(walk: Walk, call: Call) -> Any:
    """Divides by the norm along an axis, for which zeros count nothing."""
    known = call.args[0]
    axis = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 1) % known.dim
    for unit_map in known.along(axis):
        if len(varying(unit_map)) > 1:
            return NotImplemented
        walk.units.read(unit_map.reshape(-1), known.zero_along(axis))
    return known


def pool(walk: Walk, call: Call) -> Any:
    """Pooling and resizing: channels for themselves, positions mixed."""
    known = call.args[0]
    spatial = range(_first_position(walk, call.node, known), known.dim)
    why = _MIXED.format(call.node.name)
    after = [walk.all_or_none_of(unit_map, spatial, why) for unit_map in known.unit_maps]
    made = walk.shape_of(call.node)
    if made is None:
        return NotImplemented
    zero = None
    if known.zero is not None:
        zero = known.zero.all(dim=tuple(spatial), keepdim=True)
    left = tuple(unit_map for unit_map in after if unit_map is not None)
    return Known(made, left).with_zero(zero)


def _first_position(walk: Walk, node: fx.Node, known: Known) -> int:
    """The first axis of positions: a pool's number of them is in its name."""
    name = function_name(node)
    if node.op == "call_module":
        name = type(submodule(walk.graph, str(node.target))).__name__
    axes = next((n for n in (1, 2, 3) if f"{n}d" in name.lower()), None)
    return known.dim - axes if axes else 2


def matmul(walk: Walk, call: Call) -> Any:
    """A product of matrices, (…, m, k) and (…, k, n)."""
    one, other = call.args[0], call.args[1]
    if not isinstance(one, Known) or not isinstance(other, Known):
        return NotImplemented
    if one.dim == 1 or other.dim == 1:
        return NotImplemented
    dim = max(one.dim, other.dim)
    letters = "abcdefgh"[: dim - 2]
    left = letters[len(letters) - (one.dim - 2) :] + "mk"
    right = letters[len(letters) - (other.dim - 2) :] + "kn"
    return contract(walk, one, left, other, right, letters + "mn")


def einsum(walk: Walk, call: Call) -> Any:
    """A product by an equation of two operands."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    sides, arrow, out = equation.replace(" ", "").partition("->")
    inputs = sides.split(",")
    if len(inputs) != 2 or not arrow or "." in equation:
        return NotImplemented
    if any(len(set(letters)) != len(letters) for letters in inputs):
        return NotImplemented
    return contract(walk, operands[0], inputs[0], operands[1], inputs[1], out)


def linear(walk: Walk, call: Call) -> Any:
    """A linear layer whose weight (out, in) is computed, or shared."""
    given = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
    known, weight, bias = given["input"], given["weight"], given.get("bias")
    letters = "abcdefgh"[: known.dim - 1]
    made = contract(walk, known, letters + "k", weight, "nk", letters + "n")
    if bias is None or made is NotImplemented:
        return made
    zero = made.zeros() & bias.zeros().reshape([1] * (made.dim - 1) + [-1])
    return Known(made.shape, joined(walk, [made, bias], made.shape)).with_zero(zero)


def addmm(walk: Walk, call: Call) -> Any:
    """A product of matrices beside what is added to it."""
    added, one, other = call.args[:3]
    letters = "abcdefgh"[: one.dim - 2]
    made = contract(walk, one, letters + "mk", other, letters + "kn", letters + "mn")
    if call.kwargs:
        return NotImplemented
    zero = made.zeros() & added.zeros().reshape(
        [1] * (made.dim - added.dim) + [*added.zeros().shape]
    )
    return Known(made.shape, joined(walk, [made, added], made.shape)).with_zero(zero)


def embedding(walk: Walk, call: Call) -> Any:
    """Rows of a weight that is computed, or shared, by their number."""
    is_aten = isinstance(call.node.target, OpOverload)
    weight, chosen = call.args[:2] if is_aten else call.args[1::-1]
    walk.stay(chosen, "they are indices")
    for unit_map in weight.along(0):
        walk.units.keep(unit_map, "they are chosen by index")
    shape = torch.Size([*chosen.shape, weight.shape[1]])
    unit_maps = [unit_map.reshape([1] * chosen.dim + [-1]) for unit_map in weight.but(0)]
    zero = weight.zeros().all(0).reshape([1] * chosen.dim + [-1])
    return Known(shape, tuple(unit_maps)).with_zero(zero)


def contract(walk: Walk, one: Known, left: str, other: Known, right: str, out: str) -> Known:
    """A sum of products over the letters that `out` has not; letters name axes."""
    one, left = _without_ones(walk, one, left, other, right)
    other, right = _without_ones(walk, other, right, one, left)
    summed = [letter for letter in left if letter not in out]
    summed += [letter for letter in right if letter not in out and letter not in summed]
    unit_maps: list[Tensor] = []
    mine, theirs = _spread(one, left, out, summed), _spread(other, right, out, summed)
    zero = mine.zeros() | theirs.zeros()
    for axis in range(len(out), len(out) + len(summed)):
        mine, theirs, made = _summed(walk, mine, theirs, axis, zero)
        unit_maps += made
    sizes = {
        **dict(zip(right, other.shape, strict=True)),
        **dict(zip(left, one.shape, strict=True)),
    }
    shape = torch.Size([sizes.get(letter, 1) for letter in out])
    unit_maps += [*mine.unit_maps, *theirs.unit_maps]
    flat = [unit_map.reshape(unit_map.shape[: len(out)]) for unit_map in unit_maps]
    flat = _tied_where_shared(walk, flat, left, right, one, other, out)
    none = zero.all(dim=tuple(range(len(out), zero.dim()))) if summed else zero
    return Known(shape, walk.apart(flat)).with_zero(compressed(none))


def _without_ones(
    walk: Walk, known: Known, letters: str, other: Known, others: str
) -> tuple[Known, str]:
    """A tensor without axes of size 1 that are broadcast."""
    sizes = dict(zip(others, other.shape, strict=True))
    gone = [
        axis
        for axis, letter in enumerate(letters)
        if known.shape[axis] == 1 and sizes.get(letter, 1) > 1
    ]
    if not gone:
        return known, letters
    squeezed = walk.moved(known, lambda entries: entries.squeeze(tuple(gone)))
    return squeezed, "".join(letter for axis, letter in enumerate(letters) if axis not in gone)


def _spread(known: Known, letters: str, out: str, summed: list[str]) -> Known:
    """A tensor with its axes in the order of `out` and then of `summed`, of size 1 where it has
    none."""
    order = [*out, *summed]
    have = [letter for letter in order if letter in letters]
    places = [letters.index(letter) for letter in have]
    where = [order.index(letter) for letter in have]

    def arranged(tensor: Tensor) -> Tensor:
        permuted = tensor.permute(places)
        shape = [1] * len(order)
        for place, size in zip(where, permuted.shape, strict=True):
            shape[place] = size
        return permuted.reshape(shape)

    shape = arranged(torch.empty(known.shape, device="meta")).shape
    zero = None if known.zero is None else arranged(known.zero)
    return Known(shape, tuple(arranged(unit_map) for unit_map in known.unit_maps), zero)


def _summed(
    walk: Walk, mine: Known, theirs: Known, axis: int, zero: Tensor
) -> tuple[Known, Known, list[Tensor]]:
    """Both sides without the axis that is summed over, and the unit maps that the sum has: each of
    its units stands for all that are summed."""
    one, other = mine.along(axis), theirs.along(axis)
    why = "a product sums over them"
    made: list[Tensor] = []
    if one and other:
        first, second = one[0], other[0]
        walk.units.tie(first, second)
        common = torch.broadcast_tensors(first, second)[0]
        if len(varying(first)) == 1 and len(varying(second)) == 1:
            others = tuple(a for a in range(zero.dim()) if a != axis)
            nothing = zero.all(dim=others) if others else zero
            walk.units.read(first.reshape(-1), nothing.reshape(-1).expand(first.numel()))
        else:
            made = _rows_of(walk, common, zero, axis)
    elif one or other:
        for unit_map in (*one, *other):
            left = walk.all_or_none(unit_map, axis, why)
            made += [] if left is None else [left]
    return (
        Known(mine.shape, mine.but(axis), mine.zero),
        Known(theirs.shape, theirs.but(axis), theirs.zero),
        made,
    )


def _rows_of(walk: Walk, unit_map: Tensor, zero: Tensor, axis: int) -> list[Tensor]:
    """Units of what stays after a sum over one of the axes of a unit map: each stands for the units
    summed over; those can go where that does."""
    rows = unit_map.movedim(axis, -1)
    members = rows.reshape(-1, rows.shape[-1])
    stand = walk.units.whole(members)
    harmless = zero.expand([max(a, b) for a, b in zip(zero.shape, unit_map.shape, strict=True)])
    others = tuple(
        a for a in range(harmless.dim()) if unit_map.shape[a] == 1 and harmless.shape[a] > 1
    )
    if others:
        harmless = harmless.all(dim=others, keepdim=True)
    each = harmless.movedim(axis, -1).expand(rows.shape).reshape(members.shape)
    unless = stand.unsqueeze(1).expand(members.shape)
    walk.units.read(members.reshape(-1), each.reshape(-1), unless=unless.reshape(-1))
    shape = list(unit_map.shape)
    shape[axis] = 1
    return [stand.reshape(shape)]


def _tied_where_shared(
    walk: Walk,
    unit_maps: list[Tensor],
    left: str,
    right: str,
    one: Known,
    other: Known,
    out: str,
) -> list[Tensor]:
    """Colours that go as a whole along axes which both sides have, where one side has no units."""
    for place, letter in enumerate(out):
        if letter not in left or letter not in right:
            continue
        mine, theirs = one.along(left.index(letter)), other.along(right.index(letter))
        if bool(mine) != bool(theirs):
            after = [walk.all_or_none(c, place, "it meets what has no units") for c in unit_maps]
            unit_maps = [unit_map for unit_map in after if unit_map is not None]
    return unit_maps


def attention(walk: Walk, call: Call) -> Any:
    """`scaled_dot_product_attention` of (…, L, d), (…, S, d), (…, S, e): a head
    goes as a whole, or some of its width."""
    if call.node.op == "call_module":
        names: tuple[str, ...] = ("query", "key", "value", "attn_mask")
    else:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    module = submodule(walk.graph, str(call.node.target)) if call.node.op == "call_module" else None
    if call.kwargs.get("enable_gqa") or (
        isinstance(module, ScaledDotProduct) and module.enable_gqa
    ):
        return NotImplemented
    query, key, value = (given[name] for name in ("query", "key", "value"))
    return _attended(walk, query, key, value, given.get("attn_mask"))


def _attended(walk: Walk, query: Known, key: Known, value: Known, mask: Known | None) -> Any:
    why = "attention goes over all of them"
    letters = "abcdefgh"[: query.dim - 2]
    product = contract(walk, query, letters + "ld", key, letters + "sd", letters + "ls")
    ends = (product.dim - 1, product.dim - 2)
    after = [walk.all_or_none_of(unit_map, ends, why) for unit_map in product.unit_maps]
    shape = torch.Size([*product.shape[:-2], 1, 1])
    scores = Known(shape, tuple(unit_map for unit_map in after if unit_map is not None))
    if isinstance(mask, Known):
        full = torch.broadcast_shapes(shape, torch.Size([*mask.shape[:-2], 1, 1]))
        ends = (mask.dim - 1, mask.dim - 2)
        after = [walk.all_or_none_of(unit_map, ends, why) for unit_map in mask.unit_maps]
        left = tuple(unit_map for unit_map in after if unit_map is not None)
        above = Known(torch.Size([*mask.shape[:-2], 1, 1]), left)
        scores = Known(full, joined(walk, [scores, above], full))
    after = [walk.all_or_none(unit_map, value.dim - 2, why) for unit_map in value.unit_maps]
    values = Known(value.shape, tuple(unit_map for unit_map in after if unit_map is not None))
    for unit_map in scores.unit_maps:
        # Scores are read by the values alone: they go with the head that they are of.
        walk.units.read(
            unit_map.reshape(-1),
            torch.zeros(unit_map.numel(), dtype=torch.bool),
            unless=_heads(walk, unit_map, values),
        )
    made = torch.Size([*scores.shape[:-2], query.shape[-2], value.shape[-1]])
    unit_maps = joined(walk, [Known(made, scores.unit_maps), Known(made, values.unit_maps)], made)
    zero = None
    if value.zero is not None:
        zero = value.zero.all(dim=-2, keepdim=True)
    return Known(made, unit_maps).with_zero(zero)


def _heads(walk: Walk, unit_map: Tensor, values: Known) -> Tensor:
    """For each head's scores, the unit of that head; it goes if all of the head's values do."""
    for other in values.unit_maps:
        if varying(unit_map) <= varying(other):
            order = sorted(varying(unit_map))
            rest = [axis for axis in range(other.dim()) if axis not in order]
            members = other.permute(*order, *rest).reshape(unit_map.numel(), -1)
            return walk.units.whole(members)
    return torch.full((unit_map.numel(),), NONE)


def own_attention(walk: Walk, call: Call) -> Any:
    """`Attention`, whose heads stand next to each other in the last axis: (N, L, heads · d)."""
    module = submodule(walk.graph, str(call.node.target))
    assert isinstance(module, Attention)
    parts = [
        walk.moved(side, lambda e: e.unflatten(-1, (module.heads, -1))) for side in call.args[:3]
    ]
    by_head = [walk.moved(part, lambda e: e.transpose(-3, -2)) for part in parts]
    if not module.batch_first and call.args[0].dim == 3:
        return NotImplemented
    for mask in call.args[3:]:
        if isinstance(mask, Known):
            walk.stay(mask, "it is a mask of attention")
    query, key, value = by_head
    made = _attended(walk, query, key, value, None)
    heads = [c for c in made.unit_maps if c.shape[-3] > 1]
    if heads:
        walk.counts[call.name] = [(0, heads[0].reshape(module.heads, -1))]
    together = walk.moved(made, lambda e: e.transpose(-3, -2))
    return walk.moved(together, lambda e: e.flatten(-2))


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(_KEEP_SHAPE, along_axis),
    **dict.fromkeys((*_POOLS, *_RESIZE), pool),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "embedding": embedding,
    "linear": linear,
    "normalize": normalise,
    "scaled_dot_product_attention": attention,
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
    Attention: own_attention,
    ScaledDotProduct: attention,
}
