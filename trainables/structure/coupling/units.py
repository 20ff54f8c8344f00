"""Units by number: which go together, what reads them, and which can all go at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = -1
"""In the place of a unit: there is none, and what is there stays."""


@dataclass(frozen=True)
class _Read:
    """Units that an operation reads where dropping them would change what it computes, unless the
    unit of `unless` beside each (−1: none) goes too."""

    units: Tensor
    unless: Tensor


@dataclass(frozen=True)
class _Whole:
    """Units (n,) of which each stands for all `members` (n, m): it goes if and only if they do."""

    units: Tensor
    members: Tensor


@dataclass
class Units:
    """The units of a network, and what is known of them."""

    count: int = 0
    reasons: dict[str, list[Tensor]] = field(default_factory=dict)
    """What cannot go, by why."""
    _ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _reads: list[_Read] = field(default_factory=list)
    _wholes: list[_Whole] = field(default_factory=list)
    _packs: list[Tensor] = field(default_factory=list)
    _spaces: list[Tensor] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)

    def fresh(self, count: int) -> Tensor:
        """New units, (count,)."""
        made = self._next(count)
        self._spaces.append(made)
        return made

    def _next(self, count: int) -> Tensor:
        """Units that were not there before."""
        first = self.count
        self.count += count
        return torch.arange(first, self.count)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Has units go together, entry by entry; where one side has none, those of the other
        stay."""
        one, other = torch.broadcast_tensors(one, other)
        sides = [side.reshape(-1) for side in (one, other)]
        pairs = torch.stack(sides)
        is_none = pairs == NONE
        without_one, without_other = is_none
        alone = without_one != without_other
        higher = pairs.amax(0)
        self.keep(higher[alone], "it meets what has no units")
        ones, others = pairs
        both = ~is_none.any(0)
        different = both & (ones != others)
        if not different.any():
            return
        tied = pairs[:, different].unique(dim=1)
        first, second = tied
        self._ties.append((first, second))

    def keep(self, units: Tensor, why: str) -> None:
        """Has units stay."""
        kept = units[units != NONE]
        if kept.numel():
            kept_so_far = self.reasons.setdefault(why, [])
            kept_so_far.append(kept.unique())

    def keep_all(self, unit_maps: Iterable[Tensor], why: str) -> None:
        """Has the units of several maps stay."""
        for unit_map in unit_maps:
            self.keep(unit_map, why)

    def read(self, units: Tensor, harmless: Tensor, unless: Tensor | None = None) -> None:
        """Notes that units (n,) are read, where it is `harmless` (n,) if they go, or harmless if
        the unit of `unless` (n,) goes too."""
        is_unit = units != NONE
        found = is_unit & ~harmless
        if not found.any():
            return
        if unless is None:
            unless = torch.full_like(units, NONE)
        others = unless.expand_as(units)
        read = _Read(
            units=units[found],
            unless=others[found],
        )
        self._reads.append(read)

    def whole(self, members: Tensor) -> Tensor:
        """Units (n,) that each stand for all of a row of `members` (n, m)."""
        made = self._next(len(members))
        self.same_as_all(made, members)
        return made

    def same_as_all(self, units: Tensor, members: Tensor) -> None:
        """Has units (n,) go if and only if all of their row of `members` (n, m) do."""
        has_all_members = (members != NONE).all(1)
        is_unit = units != NONE
        known = has_all_members & is_unit
        unknown = ~known
        for part in (units, members):
            self.keep(part[unknown], "what it is part of stays")
        whole = _Whole(
            units=units[known],
            members=members[known],
        )
        self._wholes.append(whole)

    def pack(self, units: Tensor) -> None:
        """Has what stays of units along several axes be of one size along each of them."""
        self._packs.append(units)

    def pack_rows(self, rows: Tensor) -> None:
        """Has as many units stay of each of the rows (n, m), all of which stay, as of the hidden
        units of each layer of a recurrent one."""
        self.pack(rows)
        self._rows.append(rows)

    def never_empty(self, units: Tensor) -> None:
        """Has one of these units stay at least."""
        in_a_row = units.reshape(-1)
        self._spaces.append(in_a_row)

    def roots(self) -> Tensor:
        """One unit of those that each goes with, (count,)."""
        return _joined(self.count, self._ties)

    def parts(self) -> set[int]:
        """The units, by the one of those that each goes with, that others stand for."""
        roots = self.roots()
        found: set[int] = set()
        for whole in self._wholes:
            members = whole.members.reshape(-1)
            of_members = roots[members]
            found.update(of_members.tolist())
        return found

    def columns(self, roots: Tensor) -> list[Tensor]:
        """Sets of units of which one stays for the others' sake, where rows keep as many: one unit
        of each row, each by the one of those that it goes with."""
        if not self._rows:
            return []
        ties: list[tuple[Tensor, Tensor]] = []
        concerned: list[Tensor] = []
        for rows in self._rows:
            if (rows == NONE).any():
                continue
            first, *others = roots[rows]
            concerned.append(first)
            for other in others:
                ties.append((first, other))
                concerned.append(other)
        if not ties:
            return []
        lowest = _joined(len(roots), ties)
        different = torch.cat(concerned).unique()
        return _grouped(different, lowest[different])

    def whole_sets(self, roots: Tensor) -> list[Tensor]:
        """The sets of units that go at once where a unit stands for others: all that are joined by
        that, each by the one of those that it goes with."""
        if not self._wholes:
            return []
        count = len(roots)
        ties = [(roots, torch.arange(count))]
        concerned: list[Tensor] = []
        for whole in self._wholes:
            members = roots[whole.members]
            standing = roots[whole.units]
            of_each_member = standing.unsqueeze(1).expand_as(members)
            ones = of_each_member.reshape(-1)
            others = members.reshape(-1)
            ties.append((ones, others))
            concerned += [ones, others]
        lowest = _joined(count, ties)
        different = torch.cat(concerned).unique()
        return _grouped(different, lowest[different])

    def removable(
        self, *, structure_only: bool = False, rows: Sequence[Tensor] = (), multiple: int = 1
    ) -> Tensor:
        """The largest set of units that can all go at once, (count,) bool; with `structure_only`,
        whatever the weights are, and whether or not any stay. Of each of `rows`, units (n,), a
        `multiple` stays, or all."""
        going = _Going(self.roots())
        for groups in self.reasons.values():
            going.restore(torch.cat(groups))
        reads = self._reads
        spaces = self._spaces
        if structure_only:
            spaces = []
            reads = []
            for read in self._reads:
                reads.append(_of_structure(read))
        changed = True
        while changed or going.restore_one(rows, multiple):
            changed = False
            for read in reads:
                changed |= going.respect_read(read)
            for whole in self._wholes:
                changed |= going.respect_whole(whole)
            for units in self._packs:
                changed |= going.respect_pack(units)
            if not changed:
                # Last of all: while others may still be restored, none need stay for this.
                changed = any(going.respect_space(units) for units in spaces)
        return going.of_units()


def _grouped(members: Tensor, by: Tensor) -> list[Tensor]:
    """Those `members` together that have the same number in `by`."""
    found: dict[int, list[int]] = {}
    pairs = zip(members.tolist(), by.tolist(), strict=True)
    for member, number in pairs:
        together = found.setdefault(number, [])
        together.append(member)
    groups = []
    for together in found.values():
        groups.append(torch.tensor(together))
    return groups


class _Going:
    """Which units are to go: all at first, until what cannot go is restored."""

    def __init__(self, roots: Tensor) -> None:
        self.roots = roots
        self.gone = torch.ones_like(roots, dtype=torch.bool)
        """By the one of the units that each goes with."""

    def of_units(self) -> Tensor:
        """Which units are to go, (count,)."""
        return self.gone[self.roots]

    def are_gone(self, units: Tensor) -> Tensor:
        """Which of these are to go; for `NONE`, anything."""
        return self.gone[self.roots[units]]

    def kept(self, units: Tensor) -> Tensor:
        """Which entries stay, for units of any shape."""
        is_none = units == NONE
        return is_none | ~self.are_gone(units)

    def restore(self, units: Tensor) -> bool:
        """Has these stay, and what goes with them; whether one of them was to go."""
        there = units[units != NONE]
        places = self.roots[there]
        were_to_go = self.gone[places]
        self.gone[places] = False
        return bool(were_to_go.any())

    def restore_one(self, rows: Sequence[Tensor], multiple: int) -> bool:
        """Has one more unit stay, of the first of `rows` that a multiple is missing of; whether
        there is one. One at a time, since others come with it."""
        if multiple <= 1:
            return False
        for units in rows:
            gone = ~self.kept(units)
            missing = units[put_back(gone, multiple)]
            if missing.numel():
                self.restore(missing[:1])
                return True
        return False

    def respect_read(self, read: _Read) -> bool:
        """Has what is read stay, unless what it is read for goes too."""
        is_read = self.kept(read.unless)
        return self.restore(read.units[is_read])

    def respect_whole(self, whole: _Whole) -> bool:
        """Has what stands for others stay if one of those does; and the first of them, if it
        does."""
        itself = self.are_gone(whole.units)
        members = self.are_gone(whole.members)
        all_members = members.all(1)
        goes_alone = itself & ~all_members
        stays_alone = all_members & ~itself
        changed = False
        if self.restore(whole.units[goes_alone]):
            changed = True
        first_members = whole.members[stays_alone, :1]
        if self.restore(first_members):
            changed = True
        return changed

    def respect_pack(self, units: Tensor) -> bool:
        """Has what is needed stay for one size along each axis."""
        needed = _unpackable(self.kept(units))
        return self.restore(units[needed])

    def respect_space(self, units: Tensor) -> bool:
        """Has the first stay where none would."""
        if not units.numel():
            return False
        if self.kept(units).any():
            return False
        return self.restore(units[:1])


def put_back(gone: Tensor, multiple: int) -> Tensor:
    """Which of the units (n,) bool that are to go stay all the same, so that the number of those
    that stay is a multiple, or all of them do: the first ones, (n,) bool."""
    stay = ~gone
    count = int(stay.sum())
    missing = -count % multiple
    is_early = gone.cumsum(0) <= missing
    return gone & is_early


def _joined(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The lowest of those that pairs join each with, (count,)."""
    roots = torch.arange(count)
    if not pairs:
        return roots
    ones, others = zip(*pairs, strict=True)
    one = torch.cat(ones)
    other = torch.cat(others)
    while True:
        root = roots[one]
        other_root = roots[other]
        lowest = torch.minimum(root, other_root)
        lower = roots.clone()
        for ends in (root, other_root):
            lower.scatter_reduce_(
                dim=0,
                index=ends,
                src=lowest,
                reduce="amin",
            )
        lower = lower[lower]
        if torch.equal(lower, roots):
            return roots
        roots = lower


def _of_structure(read: _Read) -> _Read:
    """What of a read does not follow from weights: that some go only with others."""
    conditional = read.unless != NONE
    return _Read(
        units=read.units[conditional],
        unless=read.unless[conditional],
    )


def _unpackable(kept: Tensor) -> Tensor:
    """Which entries must stay too, so that those that stay are of one size along each axis: bool of
    any shape."""
    if kept.dim() < 2:
        return torch.zeros_like(kept)
    counts = kept.sum(-1)
    most = counts.max()
    rows = counts > 0
    fewer = most - counts
    missing = torch.where(rows, fewer, 0)
    gone = ~kept
    place = gone.cumsum(-1)
    in_rows_that_stay = place <= missing.unsqueeze(-1)
    in_rows_that_come_back = _unpackable(rows).unsqueeze(-1)
    comes_back = in_rows_that_stay | in_rows_that_come_back
    return gone & comes_back


def packed(tensor: Tensor, kept: Tensor) -> Tensor:
    """The entries of a tensor that stay; `kept` is bool, of the tensor's number of axes, 1 where
    all along an axis is alike."""
    shape = packed_shape(tensor.shape, kept)
    each = kept.expand(tensor.shape)
    return tensor[each].reshape(shape)


def packed_shape(shape: torch.Size, kept: Tensor) -> tuple[int, ...]:
    """The shape of what stays."""
    if kept.numel() == 0:
        return tuple(shape)
    sizes = list(shape)
    for axis in reversed(range(kept.dim())):
        if kept.shape[axis] == 1:
            continue
        counts = kept.sum(axis, keepdim=True)
        sizes[axis] = int(counts.max())
        kept = counts > 0
    return tuple(sizes)
