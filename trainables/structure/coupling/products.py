"""Products of tensors: of two that are computed, or of one and a weight that layers share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.structure.coupling.joining import joined, lined_up
from slimfront.trainables.structure.coupling.known import Known, all_but, compressed, varying
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.torch_internals import OpOverload

_IN_FRONT = "".join(map(chr, range(0x3B1, 0x3B9)))
"""The letters of the axes that an ellipsis stands for, the last of them where there are fewer: none
that an equation has."""
_BATCH = "abcdefgh"
"""The letters of the axes that both sides have, in front of those of matrices."""


@dataclass(frozen=True)
class Lettered:
    """A tensor whose axes are named by letters."""

    known: Known
    letters: str

    def sizes(self) -> dict[str, int]:
        """How long each axis is."""
        return dict(zip(self.letters, self.known.shape, strict=True))

    def has_units_along(self, letter: str) -> bool:
        """Whether units vary along an axis."""
        axis = self.letters.index(letter)
        return bool(self.known.along(axis))

    def without_ones(self, walk: Walk, other: "Lettered") -> "Lettered":
        """The tensor without axes of size 1 that are broadcast against another tensor."""
        sizes = other.sizes()
        gone = []
        left = ""
        for axis, letter in enumerate(self.letters):
            is_one = self.known.shape[axis] == 1
            if is_one and sizes.get(letter, 1) > 1:
                gone.append(axis)
            else:
                left += letter
        if not gone:
            return self

        def squeezed(entries: Tensor) -> Tensor:
            return entries.squeeze(tuple(gone))

        known = walk.moved(self.known, squeezed)
        return Lettered(known, left)

    def spread(self, order: str) -> Known:
        """The tensor with its axes in this order, and of size 1 where it has none."""
        own = [letter for letter in order if letter in self.letters]
        places = [self.letters.index(letter) for letter in own]

        def arranged(tensor: Tensor) -> Tensor:
            permuted = tensor.permute(places)
            sizes = dict(zip(own, permuted.shape, strict=True))
            shape = [sizes.get(letter, 1) for letter in order]
            return permuted.reshape(shape)

        like = torch.empty(self.known.shape, device="meta")
        unit_maps = []
        for unit_map in self.known.unit_maps:
            unit_maps.append(arranged(unit_map))
        zero = self.known.zero
        if zero is not None:
            zero = arranged(zero)
        return Known(
            shape=arranged(like).shape,
            unit_maps=tuple(unit_maps),
            zero=zero,
        )


def matmul(walk: Walk, call: Call) -> Any:
    """A product of matrices, (…, m, k) and (…, k, n), or of one and a vector (k)."""
    for side in call.args[:2]:
        if not isinstance(side, Known):
            return NotImplemented
    one, other = call.args[:2]
    gone = []
    if one.dim == 1:
        one = walk.moved(one, lambda entries: entries.unsqueeze(0))
        gone.append(-2)
    if other.dim == 1:
        other = walk.moved(other, lambda entries: entries.unsqueeze(1))
        gone.append(-1)
    made = _product_of_matrices(walk, one, other)
    if not gone:
        return made
    return walk.moved(made, lambda entries: entries.squeeze(tuple(gone)))


def _product_of_matrices(walk: Walk, one: Known, other: Known) -> Known:
    dim = max(one.dim, other.dim)
    batch = _BATCH[: dim - 2]
    batch_of_one = batch[dim - one.dim :]
    batch_of_other = batch[dim - other.dim :]
    return contract(
        walk,
        Lettered(one, batch_of_one + "mk"),
        Lettered(other, batch_of_other + "kn"),
        out=batch + "mn",
    )


def einsum(walk: Walk, call: Call) -> Any:
    """A product by an equation of two operands, or of more, one after another."""
    equation, *operands = call.args
    first = operands[0]
    are_in_list = isinstance(first, list | tuple)
    if are_in_list and len(operands) == 1:
        operands = list(first)
    sides, out = _spelled_out(equation, [operand.dim for operand in operands])
    if len(sides) < 2:
        return NotImplemented
    for letters in sides:
        different = set(letters)
        has_diagonal = len(different) < len(letters)
        if has_diagonal:
            return NotImplemented
    first, *others = [Lettered(*pair) for pair in zip(operands, sides, strict=True)]
    made = first
    for place, other in enumerate(others, start=2):
        needed = out + "".join(sides[place:])
        both = made.letters + other.letters
        left = "".join(dict.fromkeys(letter for letter in both if letter in needed))
        if place == len(sides):
            left = out
        made = Lettered(contract(walk, made, other, out=left), left)
    return made.known


def _spelled_out(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """The letters of each operand of an equation, and those of what it makes: letters in the place
    of an ellipsis, and those that stand once where what it makes is left out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    sides = []
    widest = ""
    for letters, dim in zip(left.split(","), dims, strict=True):
        named = len(letters.replace("...", ""))
        ellipsis = _IN_FRONT[len(_IN_FRONT) - (dim - named) :]
        if "..." in letters and len(ellipsis) > len(widest):
            widest = ellipsis
        sides.append(letters.replace("...", ellipsis))
    if not arrow:
        once = [
            letter for letter in sorted(set("".join(sides))) if "".join(sides).count(letter) == 1
        ]
        return sides, widest + "".join(letter for letter in once if letter not in widest)
    return sides, out.replace("...", widest)


def linear(walk: Walk, call: Call) -> Any:
    """A linear layer whose weight (out, in) is computed, or shared."""
    given = call.named("input", "weight", "bias")
    return linear_of(walk, given["input"], given["weight"], given.get("bias"))


def linear_of(walk: Walk, known: Known, weight: Known, bias: Known | None) -> Known:
    """(…, in) times a weight (out, in), with what is added."""
    batch = _BATCH[: known.dim - 1]
    made = contract(
        walk,
        Lettered(known, batch + "k"),
        Lettered(weight, "nk"),
        out=batch + "n",
    )
    if bias is None:
        return made
    return added(walk, made, bias)


def addmm(walk: Walk, call: Call) -> Any:
    """A product of matrices beside what is added to it."""
    more, one, other = call.args[:3]
    made = _product_of_matrices(walk, one, other)
    has_factors = bool(call.kwargs)
    if has_factors:
        return NotImplemented
    return added(walk, made, more)


def added(walk: Walk, made: Known, more: Known) -> Known:
    """A product to which something is added that is broadcast."""
    wide = lined_up(more, made.dim)
    zero = made.zeros() & wide.zeros()
    summed = Known(
        shape=made.shape,
        unit_maps=joined(walk, [made, more], made.shape),
    )
    return summed.with_zero(zero)


def embedding(walk: Walk, call: Call) -> Any:
    """Rows of a weight that is computed, or shared, by their number."""
    if isinstance(call.node.target, OpOverload):
        weight, chosen = call.args[:2]
    else:
        chosen, weight = call.args[:2]
    walk.stay(chosen, "they are indices")
    for unit_map in weight.along(0):
        walk.units.keep(unit_map, "they are chosen by index")
    ones = [1] * chosen.dim
    shape_of_row = [*ones, -1]
    unit_maps = []
    for unit_map in weight.but(0):
        row = unit_map.reshape(shape_of_row)
        unit_maps.append(row)
    _, width = weight.shape
    made = Known(
        shape=torch.Size([*chosen.shape, width]),
        unit_maps=tuple(unit_maps),
    )
    zero = weight.zeros().all(0)
    return made.with_zero(zero.reshape(shape_of_row))


def contract(walk: Walk, one: Lettered, other: Lettered, out: str) -> Known:
    """A sum of products over the letters that `out` has not."""
    one = one.without_ones(walk, other)
    other = other.without_ones(walk, one)
    summed = _not_in(out, one.letters + other.letters)
    order = out + summed
    summed_axes = range(len(out), len(order))
    mine = one.spread(order)
    theirs = other.spread(order)
    zero = mine.zeros() | theirs.zeros()
    unit_maps: list[Tensor] = []
    for axis in summed_axes:
        unit_maps += _summed(
            walk,
            mine,
            theirs,
            axis=axis,
            zero=zero,
        )
        mine = mine.without_units(axis)
        theirs = theirs.without_units(axis)
    unit_maps += mine.unit_maps
    unit_maps += theirs.unit_maps
    flat = _without_last(unit_maps, len(summed))
    for axis in _with_units_on_one_side(one, other, out):
        flat = walk.left_of(
            flat,
            axes=[axis],
            why="it meets what has no units",
        )
    if summed:
        zero = zero.all(dim=tuple(summed_axes))
    made = Known(
        shape=_shape(one, other, out),
        unit_maps=walk.apart(flat),
    )
    return made.with_zero(compressed(zero))


def _not_in(out: str, letters: str) -> str:
    """The letters, each once, that `out` has not."""
    found = ""
    for letter in letters:
        if letter not in out + found:
            found += letter
    return found


def _without_last(unit_maps: list[Tensor], axes: int) -> tuple[Tensor, ...]:
    """Unit maps without so many last axes, which are of size 1."""
    found = []
    for unit_map in unit_maps:
        left = unit_map.dim() - axes
        shape = unit_map.shape[:left]
        found.append(unit_map.reshape(shape))
    return tuple(found)


def _shape(one: Lettered, other: Lettered, out: str) -> torch.Size:
    """The shape of a product."""
    sizes = other.sizes() | one.sizes()
    found = []
    for letter in out:
        found.append(sizes.get(letter, 1))
    return torch.Size(found)


def _with_units_on_one_side(one: Lettered, other: Lettered, out: str) -> list[int]:
    """The axes of a product which both sides have, but only one of them has units along."""
    found = []
    for axis, letter in enumerate(out):
        if letter not in one.letters:
            continue
        if letter not in other.letters:
            continue
        of_one = one.has_units_along(letter)
        of_other = other.has_units_along(letter)
        if of_one != of_other:
            found.append(axis)
    return found


def _summed(walk: Walk, mine: Known, theirs: Known, axis: int, zero: Tensor) -> tuple[Tensor, ...]:
    """The unit maps that a sum over an axis has: each of its units stands for all that are
    summed."""
    one = mine.along(axis)
    other = theirs.along(axis)
    if not one or not other:
        on_one_side = [*one, *other]
        return walk.left_of(
            on_one_side,
            axes=[axis],
            why="a product sums over them",
        )
    first = one[0]
    second = other[0]
    walk.units.tie(first, second)
    axes = varying(first) | varying(second)
    if len(axes) > 1:
        common, _ = torch.broadcast_tensors(first, second)
        rows = _rows_of(walk, common, zero, axis)
        return (rows,)
    units = first.reshape(-1)
    harmless = all_but(zero, axis)
    walk.units.read(units, harmless.expand(units.shape))
    return ()


def _rows_of(walk: Walk, unit_map: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Units of what stays after a sum over one of the axes of a unit map: each stands for the units
    summed over; those can go where that does."""
    rows = unit_map.movedim(axis, -1)
    summed_over = rows.shape[-1]
    members = rows.reshape(-1, summed_over)
    stand = walk.units.whole(members)
    of_each_member = stand.unsqueeze(1)
    unless = of_each_member.expand(members.shape)
    zero_of_units = _over_others(zero, unit_map)
    zero_of_rows = zero_of_units.movedim(axis, -1)
    harmless = zero_of_rows.expand(rows.shape)
    walk.units.read(
        units=members.reshape(-1),
        harmless=harmless.reshape(-1),
        unless=unless.reshape(-1),
    )
    shape = list(unit_map.shape)
    shape[axis] = 1
    return stand.reshape(shape)


def _over_others(zero: Tensor, unit_map: Tensor) -> Tensor:
    """Where all is 0 over the axes along which a unit map does not vary, and `zero` does."""
    others = []
    for axis, size in enumerate(unit_map.shape):
        if size > 1:
            continue
        if zero.shape[axis] > 1:
            others.append(axis)
    if not others:  # torch takes no axes for all of them
        return zero
    return zero.all(dim=tuple(others), keepdim=True)


FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "embedding": embedding,
    **dict.fromkeys(("linear", "inner"), linear),
}
