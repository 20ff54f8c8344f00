"""Units by number: which go together, what reads them, and which can all go at once."""

from collections.abc import Callable, Sequence
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

    def fresh(self, count: int) -> Tensor:
        """New units, (count,)."""
        made = torch.arange(self.count, self.count + count)
        self.count += count
        self._spaces.append(made)
        return made

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Has units go together, entry by entry; where one side has none, those of the other
        stay."""
        one, other = (side.reshape(-1) for side in torch.broadcast_tensors(one, other))
        alone = (one == NONE) != (other == NONE)
        self.keep(torch.maximum(one, other)[alone], "it meets what has no units")
        both = (one != NONE) & (other != NONE) & (one != other)
        if both.any():
            pairs = torch.stack([one[both], other[both]]).unique(dim=1)
            self._ties.append((pairs[0], pairs[1]))

    def keep(self, units: Tensor, why: str) -> None:
        """Has units stay."""
        kept = units[units != NONE]
        if kept.numel():
            self.reasons.setdefault(why, []).append(kept.reshape(-1).unique())

    def read(self, units: Tensor, harmless: Tensor, unless: Tensor | None = None) -> None:
        """Notes that units (n,) are read, where it is `harmless` (n,) if they go, or harmless if
        the unit of `unless` (n,) goes too."""
        found = (units != NONE) & ~harmless
        if found.any():
            others = torch.full_like(units, NONE) if unless is None else unless
            self._reads.append(_Read(units[found], others.expand_as(units)[found]))

    def whole(self, members: Tensor) -> Tensor:
        """Units (n,) that each stand for all of a row of `members` (n, m)."""
        made = torch.arange(self.count, self.count + len(members))
        self.count += len(members)
        self.same_as_all(made, members)
        return made

    def same_as_all(self, units: Tensor, members: Tensor) -> None:
        """Has units (n,) go if and only if all of their row of `members` (n, m) do."""
        known = (units != NONE) & (members != NONE).all(1)
        self.keep(units[~known], "what it is part of stays")
        self.keep(members[~known], "what it is part of stays")
        self._wholes.append(_Whole(units[known], members[known]))

    def pack(self, units: Tensor) -> None:
        """Has what stays of units along several axes be of one size along each of them."""
        self._packs.append(units)

    def never_empty(self, units: Tensor) -> None:
        """Has one of these units stay at least."""
        self._spaces.append(units.reshape(-1))

    def roots(self) -> Tensor:
        """One unit of those that each goes with, (count,)."""
        return _joined(self.count, self._ties)

    def parts(self) -> set[int]:
        """The units, by the one of those that each goes with, that others stand for."""
        roots = self.roots()
        return {
            int(root)
            for whole in self._wholes
            for root in roots[whole.members.reshape(-1)].unique()
        }

    def whole_sets(self, roots: Tensor) -> list[Tensor]:
        """The sets of units that go at once where a unit stands for others: all that are joined by
        that, each by the one of those that it goes with."""
        pairs = [
            (
                whole.units.unsqueeze(1).expand_as(whole.members).reshape(-1),
                whole.members.reshape(-1),
            )
            for whole in self._wholes
        ]
        if not pairs:
            return []
        ones = torch.cat([roots[one] for one, _ in pairs])
        others = torch.cat([roots[other] for _, other in pairs])
        joined = _joined(len(roots), [(roots, torch.arange(len(roots))), (ones, others)])
        found: dict[int, list[int]] = {}
        for root in torch.cat([ones, others]).unique().tolist():
            found.setdefault(int(joined[root]), []).append(root)
        return [torch.tensor(group) for group in found.values()]

    def removable(
        self, *, structure_only: bool = False, rows: Sequence[Tensor] = (), multiple: int = 1
    ) -> Tensor:
        """The largest set of units that can all go at once, (count,) bool; with `structure_only`,
        whatever the weights are, and whether or not any stay. Of each of `rows`, units (n,), a
        `multiple` stays, or all."""
        roots = self.roots()
        gone = torch.ones(self.count, dtype=torch.bool)

        def restore(units: Tensor) -> bool:
            """Whether one of these was to go."""
            places = roots[units[units != NONE]]
            changed = bool(gone[places].any())
            gone[places] = False
            return changed

        for groups in self.reasons.values():
            restore(torch.cat(groups))
        reads = self._reads
        if structure_only:
            reads = [_of_structure(read) for read in self._reads]
        changed = True
        while changed or _add_one(rows, multiple, gone, roots):
            changed = False
            for read in reads:
                without = (read.unless == NONE) | ~gone[roots[read.unless]]
                changed |= restore(read.units[without])
            for whole in self._wholes:
                changed |= self._agree(whole, gone, roots, restore)
            for units in self._packs:
                changed |= restore(units[_unpackable(_kept(units, gone[roots]))])
            for units in () if structure_only else self._spaces:
                if units.numel() and not _kept(units, gone[roots]).any():
                    changed |= restore(units[:1])
        return gone[roots]

    @staticmethod
    def _agree(
        whole: _Whole, gone: Tensor, roots: Tensor, restore: Callable[[Tensor], bool]
    ) -> bool:
        all_gone = gone[roots[whole.members]].all(1)
        itself = gone[roots[whole.units]]
        changed = restore(whole.units[itself & ~all_gone])
        return restore(whole.members[all_gone & ~itself, :1]) or changed


def _add_one(rows: Sequence[Tensor], multiple: int, gone: Tensor, roots: Tensor) -> bool:
    """Has one more unit stay, of the first of `rows` that a multiple is missing of; whether there
    is one. One at a time, since others come with it."""
    for units in rows if multiple > 1 else ():
        short = put_back(~_kept(units, gone[roots]), multiple)
        if short.any():
            gone[roots[units[short][:1]]] = False
            return True
    return False


def put_back(gone: Tensor, multiple: int) -> Tensor:
    """Which of the units (n,) bool that are to go stay all the same, so that the number of those
    that stay is a multiple, or all of them do: the first ones, (n,) bool."""
    missing = -int((~gone).sum()) % multiple
    return gone & (gone.cumsum(0) <= missing)


def _joined(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The lowest of those that pairs join each with, (count,)."""
    roots = torch.arange(count)
    if not pairs:
        return roots
    one, other = (torch.cat(sides) for sides in zip(*pairs, strict=True))
    while True:
        lowest = torch.minimum(roots[one], roots[other])
        lower = roots.clone()
        lower.scatter_reduce_(0, roots[one], lowest, "amin")
        lower.scatter_reduce_(0, roots[other], lowest, "amin")
        lower = lower[lower]
        if torch.equal(lower, roots):
            return roots
        roots = lower


def _of_structure(read: _Read) -> _Read:
    """What of a read does not follow from weights: that some go only with others."""
    conditional = read.unless != NONE
    return _Read(read.units[conditional], read.unless[conditional])


def _kept(units: Tensor, gone: Tensor) -> Tensor:
    """Which entries stay, for units of any shape."""
    return (units == NONE) | ~gone[units]


def _unpackable(kept: Tensor) -> Tensor:
    """Which entries must stay too, so that those that stay are of one size along each axis: bool of
    any shape."""
    if kept.dim() < 2:
        return torch.zeros_like(kept)
    counts = kept.sum(-1)
    most = counts.max()
    rows = counts > 0
    missing = torch.where(rows, most - counts, 0)
    place = (~kept).cumsum(-1)
    wanted = ~kept & (place <= missing.unsqueeze(-1))
    return wanted | (_unpackable(rows).unsqueeze(-1) & ~kept)


def packed(tensor: Tensor, kept: Tensor) -> Tensor:
    """The entries of a tensor that stay; `kept` is bool, of the tensor's number of axes, 1 where
    all along an axis is alike."""
    shape = packed_shape(tensor.shape, kept)
    return tensor[kept.expand(tensor.shape)].reshape(shape)


def packed_shape(shape: torch.Size, kept: Tensor) -> tuple[int, ...]:
    """The shape of what stays."""
    sizes = list(shape)
    while kept.dim() and kept.numel() > 1:
        last = max(axis for axis in range(kept.dim()) if kept.shape[axis] > 1)
        counts = kept.sum(last, keepdim=True)
        sizes[last] = int(counts.max())
        kept = counts > 0
    return tuple(sizes)
