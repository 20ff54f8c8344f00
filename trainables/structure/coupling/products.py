"""Products of tensors: of two that are computed, or of one and a weight that layers share."""

from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.structure.coupling.joining import joined, lined_up
from slimfront.trainables.structure.coupling.known import Known, all_but, compressed, varying
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.torch_internals import OpOverload

_BATCH = "abcdefgh"
"""The letters of the axes that both sides have, in front of those of matrices."""


def matmul(walk: Walk, call: Call) -> Any:
    """A product of matrices, (…, m, k) and (…, k, n)."""
    one, other = call.args[:2]
    if not isinstance(one, Known) or not isinstance(other, Known):
        return NotImplemented
    if one.dim == 1 or other.dim == 1:
        return NotImplemented
    dim = max(one.dim, other.dim)
    batch = _BATCH[: dim - 2]
    left = batch[dim - one.dim :] + "mk"
    right = batch[dim - other.dim :] + "kn"
    return contract(walk, one, left, other, right, batch + "mn")


def einsum(walk: Walk, call: Call) -> Any:
    """A product by an equation of two operands."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    without_spaces = equation.replace(" ", "")
    sides, arrow, out = without_spaces.partition("->")
    inputs = sides.split(",")
    if len(inputs) != 2 or not arrow or "." in equation:
        return NotImplemented
    for letters in inputs:
        if len(set(letters)) != len(letters):  # a diagonal
            return NotImplemented
    one, other = operands[:2]
    left, right = inputs
    return contract(walk, one, left, other, right, out)


def linear(walk: Walk, call: Call) -> Any:
    """A linear layer whose weight (out, in) is computed, or shared."""
    given = call.named("input", "weight", "bias")
    known = given["input"]
    bias = given.get("bias")
    batch = _BATCH[: known.dim - 1]
    made = contract(walk, known, batch + "k", given["weight"], "nk", batch + "n")
    if bias is None:
        return made
    return _added(walk, made, bias)


def addmm(walk: Walk, call: Call) -> Any:
    """A product of matrices beside what is added to it."""
    added, one, other = call.args[:3]
    batch = _BATCH[: one.dim - 2]
    made = contract(walk, one, batch + "mk", other, batch + "kn", batch + "mn")
    if call.kwargs:
        return NotImplemented
    return _added(walk, made, added)


def _added(walk: Walk, made: Known, added: Known) -> Known:
    """A product to which something is added that is broadcast."""
    wide = lined_up(added, made.dim)
    zero = made.zeros() & wide.zeros()
    unit_maps = joined(walk, [made, added], made.shape)
    return Known(made.shape, unit_maps).with_zero(zero)


def embedding(walk: Walk, call: Call) -> Any:
    """Rows of a weight that is computed, or shared, by their number."""
    one, other = call.args[:2]
    is_aten = isinstance(call.node.target, OpOverload)
    weight, chosen = (one, other) if is_aten else (other, one)
    walk.stay(chosen, "they are indices")
    for unit_map in weight.along(0):
        walk.units.keep(unit_map, "they are chosen by index")
    in_front = [1] * chosen.dim
    columns = [unit_map.reshape([*in_front, -1]) for unit_map in weight.but(0)]
    zero = weight.zeros().all(0)
    width = weight.shape[1]
    made = Known(torch.Size([*chosen.shape, width]), tuple(columns))
    return made.with_zero(zero.reshape([*in_front, -1]))


def contract(walk: Walk, one: Known, left: str, other: Known, right: str, out: str) -> Known:
    """A sum of products over the letters that `out` has not; letters name axes."""
    one, left = _without_ones(walk, one, left, other, right)
    other, right = _without_ones(walk, other, right, one, left)
    summed = "".join(dict.fromkeys(letter for letter in left + right if letter not in out))
    mine = _spread(one, left, out + summed)
    theirs = _spread(other, right, out + summed)
    zero = mine.zeros() | theirs.zeros()
    unit_maps: list[Tensor] = []
    for axis in range(len(out), mine.dim):
        unit_maps += _summed(walk, mine, theirs, axis, zero)
        mine = Known(mine.shape, mine.but(axis), mine.zero)
        theirs = Known(theirs.shape, theirs.but(axis), theirs.zero)
    unit_maps += mine.unit_maps
    unit_maps += theirs.unit_maps
    kept_axes = len(out)
    flat = [unit_map.reshape(unit_map.shape[:kept_axes]) for unit_map in unit_maps]
    for axis in _with_units_on_one_side(one, left, other, right, out):
        flat = list(walk.left_of(flat, [axis], "it meets what has no units"))
    sizes = _sizes(other, right) | _sizes(one, left)
    shape = [sizes.get(letter, 1) for letter in out]
    made = Known(torch.Size(shape), walk.apart(flat))
    if summed:
        zero = zero.all(dim=tuple(range(kept_axes, zero.dim())))
    return made.with_zero(compressed(zero))


def _sizes(known: Known, letters: str) -> dict[str, int]:
    """The size of each axis by its letter."""
    return dict(zip(letters, known.shape, strict=True))


def _without_ones(
    walk: Walk, known: Known, letters: str, other: Known, others: str
) -> tuple[Known, str]:
    """A tensor without axes of size 1 that are broadcast."""
    sizes = _sizes(other, others)
    gone = []
    left = ""
    for axis, letter in enumerate(letters):
        is_broadcast = known.shape[axis] == 1 and sizes.get(letter, 1) > 1
        if is_broadcast:
            gone.append(axis)
        else:
            left += letter
    if not gone:
        return known, letters
    return walk.moved(known, lambda entries: entries.squeeze(tuple(gone))), left


def _spread(known: Known, letters: str, order: str) -> Known:
    """A tensor with its axes in this order, and of size 1 where it has none."""
    have = [letter for letter in order if letter in letters]
    places = [letters.index(letter) for letter in have]

    def arranged(tensor: Tensor) -> Tensor:
        permuted = tensor.permute(places)
        sizes = dict(zip(have, permuted.shape, strict=True))
        shape = [sizes.get(letter, 1) for letter in order]
        return permuted.reshape(shape)

    like = torch.empty(known.shape, device="meta")
    unit_maps = [arranged(unit_map) for unit_map in known.unit_maps]
    zero = None if known.zero is None else arranged(known.zero)
    return Known(arranged(like).shape, tuple(unit_maps), zero)


def _summed(walk: Walk, mine: Known, theirs: Known, axis: int, zero: Tensor) -> list[Tensor]:
    """The unit maps that a sum over an axis has: each of its units stands for all that are
    summed."""
    one = mine.along(axis)
    other = theirs.along(axis)
    if not one or not other:
        return list(walk.left_of([*one, *other], [axis], "a product sums over them"))
    first, second = one[0], other[0]
    walk.units.tie(first, second)
    if len(varying(first)) > 1 or len(varying(second)) > 1:
        common = torch.broadcast_tensors(first, second)[0]
        return [_rows_of(walk, common, zero, axis)]
    units = first.reshape(-1)
    nothing = all_but(zero, axis)
    walk.units.read(units, nothing.expand(units.shape))
    return []


def _rows_of(walk: Walk, unit_map: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Units of what stays after a sum over one of the axes of a unit map: each stands for the units
    summed over; those can go where that does."""
    rows = unit_map.movedim(axis, -1)
    members = rows.reshape(-1, rows.shape[-1])
    stand = walk.units.whole(members)
    harmless = _over_others(zero, unit_map)
    harmless = harmless.movedim(axis, -1).expand(rows.shape)
    unless = stand.unsqueeze(1).expand(members.shape)
    walk.units.read(members.reshape(-1), harmless.reshape(-1), unless=unless.reshape(-1))
    shape = list(unit_map.shape)
    shape[axis] = 1
    return stand.reshape(shape)


def _over_others(zero: Tensor, unit_map: Tensor) -> Tensor:
    """Where all is 0 over the axes along which a unit map does not vary, and `zero` does."""
    others = []
    for axis, size in enumerate(unit_map.shape):
        if size == 1 and zero.shape[axis] > 1:
            others.append(axis)
    if not others:  # torch takes no axes for all of them
        return zero
    return zero.all(dim=tuple(others), keepdim=True)


def _with_units_on_one_side(one: Known, left: str, other: Known, right: str, out: str) -> list[int]:
    """The axes of a product which both sides have, but only one of them has units along."""
    found = []
    for place, letter in enumerate(out):
        if letter in left and letter in right:
            mine = one.along(left.index(letter))
            theirs = other.along(right.index(letter))
            if bool(mine) != bool(theirs):
                found.append(place)
    return found


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "embedding": embedding,
    "linear": linear,
}
