"""Units that can only be removed together, by our own graph of units: for what Torch-Pruning's
graph does not follow.

That is code that chooses by shapes, axes that are turned about, attention of linear layers whose
heads go as a whole, and networks that torch.export traces.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.channel_groups import UnitGroup
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.coupling.graph_of_units import units_of
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Walk
from slimfront.trainables.structure.graph import trace
from slimfront.trainables.structure.tracing.exported import writes_elsewhere
from slimfront.trainables.tasks.evaluating import evaluating


@dataclass(frozen=True)
class SharedUnits(UnitGroup):
    """Units that each are rows of several layers' parameters."""

    readers: Mapping[str, Tensor]
    """What reads the units, by parameter name: the unit of each column (columns,) of it; −1: none
    of this group."""
    read_axes: Mapping[str, int]
    """Along which axis those columns lie."""

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that make or read its units."""
        return {*self.writers, *self.readers}

    def importance(
        self, of_entry: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum of `of_entry` over what makes and reads each unit, relative to the mean:
        (units,)."""
        first = parameters[next(iter(self.writers))]
        total = first.new_zeros(self.units)
        for name, owners in self.writers.items():
            entries = self.rows(name, of_entry(parameters[name]))
            total = _added(total, owners, entries.reshape(len(owners), -1))
        for name, owners in self.readers.items():
            columns = of_entry(parameters[name]).movedim(self.read_axes[name], 0)
            total = _added(total, owners, columns.reshape(len(owners), -1))
        relative: Tensor = total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)
        return relative


def _added(total: Tensor, owners: Tensor, of_rows: Tensor) -> Tensor:
    owners = owners.to(total.device)
    mine = owners >= 0
    return total.index_add(0, owners[mine], of_rows.sum(1)[mine].to(total))


def shared_units(
    network: nn.Module, inputs: Tensor, taken: Iterable[str] = ()
) -> list[SharedUnits]:
    """The groups whose units can be removed one by one once their rows are zero, in order of
    execution, but for those that make or are made by the parameters `taken`; none for a network
    that cannot be traced.

    That they can is tried on a copy in which one unit of each is zero.
    """
    try:
        with evaluating(network):
            graph = trace(network, inputs[:3])
    except UserError:
        return []
    if writes_elsewhere(graph):
        return []
    walk = units_of(graph, inputs[:2])
    candidates = _candidates(walk)
    groups = [group for group in map(_Candidates.group, candidates) if group is not None]
    free = [group for group in groups if not {*taken} & group.writers.keys()]
    return _tried(graph, inputs, _by_name(free))


def unknown_operations(network: nn.Module, inputs: Tensor) -> list[str]:
    """The operations, by name, of which no handler says what they do to units; none for a network
    that cannot be traced."""
    try:
        with evaluating(network):
            graph = trace(network, inputs[:3])
    except UserError:
        return []
    return list(dict.fromkeys(units_of(graph, inputs[:2]).unknown))


def _by_name(groups: list[SharedUnits]) -> list[SharedUnits]:
    """Groups whose names differ: those of one layer are named by their first weight."""
    count = Counter(group.name for group in groups)
    return [
        replace(group, name=_first_weight(group)) if count[group.name] > 1 else group
        for group in groups
    ]


def _first_weight(group: SharedUnits) -> str:
    return next((name for name in group.writers if "weight" in name), next(iter(group.writers)))


@dataclass(frozen=True)
class _Candidates:
    """Sets of units that are rows of the same parameters: each set would go at once."""

    walk: Walk
    sets: list[Tensor]

    def group(self) -> SharedUnits | None:
        """The group that has each set as a unit; None where they are too few, or along two axes of
        one parameter."""
        if len(self.sets) < 2:
            return None
        owner_of = torch.full((self.walk.units.count + 1,), NONE)
        roots = self.walk.units.roots()
        for number, units in enumerate(self.sets):
            owner_of[units] = number
        owner_of[:-1] = owner_of[roots]
        writers: dict[str, Tensor] = {}
        readers: dict[str, Tensor] = {}
        axes: dict[str, int] = {}
        read_axes: dict[str, int] = {}
        for name, axis, noted in _noted(self.walk):
            owners = owner_of[noted]
            if bool((owners == NONE).all()) or not _is_parameter(self.walk.graph, name):
                continue
            makes = (name, axis) in self.walk.writing
            of, along = (writers, axes) if makes else (readers, read_axes)
            if name in of:
                return None
            of[name], along[name] = owners, axis
        if not writers:
            return None
        first = next(iter(writers))
        name = first.rpartition(".")[0] or first
        return SharedUnits(name, len(self.sets), writers, readers, read_axes, axes=axes)


def _noted(walk: Walk) -> Iterator[tuple[str, int, Tensor]]:
    """The parameters and buffers by name, the axes along which they have units, and those."""
    for name, axes in walk.tensors.items():
        for axis, units in enumerate(axes):
            if units is not None and units.numel():
                yield name, axis, units


def _is_parameter(graph: fx.GraphModule, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return isinstance(getattr(graph.get_submodule(owner), leaf), nn.Parameter)


def _candidates(walk: Walk) -> list[_Candidates]:
    """Units that can go alone, and sets that stand for all of a head, by what they are rows of."""
    roots = walk.units.roots()
    may_go = walk.units.removable(structure_only=True)
    signatures: dict[tuple[str, ...], list[Tensor]] = {}
    signature_of: dict[int, list[str]] = {}
    for name, axis, units in _noted(walk):
        for root in roots[units[units != NONE]].unique().tolist():
            signature_of.setdefault(root, []).append(f"{name}:{axis}")
    within = walk.units.parts()
    for root, signature in signature_of.items():
        if bool(may_go[root]) and root not in within:
            signatures.setdefault(tuple(sorted(signature)), []).append(torch.tensor([root]))
    for whole in walk.units.whole_sets(roots):
        if not bool(may_go[whole].all()):
            continue
        names = {name for root in whole.tolist() for name in signature_of.get(root, ())}
        if names:
            signatures.setdefault(tuple(sorted(names)), []).append(whole)
    return [_Candidates(walk, sets) for sets in signatures.values()]


def _tried(graph: fx.GraphModule, inputs: Tensor, groups: list[SharedUnits]) -> list[SharedUnits]:
    """Those groups of which a unit that is zero can go, tried with one of each."""
    zeroed = copied(graph)
    chosen = {group.name: group.units // 3 for group in groups}
    parameters = dict(zeroed.named_parameters())
    with torch.no_grad():
        for group in groups:
            for name, owners in group.writers.items():
                rows = group.rows(name, parameters[name])
                rows[(owners == chosen[group.name]).to(rows.device)] = 0
    walk = units_of(zeroed, inputs[:2])
    gone = walk.units.removable()
    return [group for group in groups if _is_gone(walk, gone, group, chosen[group.name])]


def _is_gone(walk: Walk, gone: Tensor, group: SharedUnits, number: int) -> bool:
    for name, owners in group.writers.items():
        units = walk.units_of(name, group.axes.get(name, 0))
        if units is None or not bool(gone[units[owners == number]].all()):
            return False
    return True
