"""Units that can only be removed together, by our own graph of units: for what Torch-Pruning's
graph does not follow.

That is code that chooses by shapes, axes that are turned about, attention of linear layers whose
heads go as a whole, and networks that torch.export traces.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.channel_groups import UnitGroup, relative_to_mean
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.coupling.graph_of_units import units_of
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Walk
from slimfront.trainables.structure.tracing.exported import writes_elsewhere
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating


@dataclass(frozen=True)
class SharedUnits(UnitGroup):
    """Units that each are rows of several layers' parameters."""

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that make or read its units."""
        return {*self.writers, *self.readers}

    def importance(
        self, of_entry: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum of `of_entry` over what makes and reads each unit, relative to the mean:
        (units,)."""
        first = next(iter(self.writers))
        like = parameters[first]
        total = like.new_zeros(self.units)
        for name, owners in self.writers.items():
            entries = of_entry(parameters[name])
            rows = self.rows(name, entries)
            total = added(total, owners, rows)
        for name, owners in self.readers.items():
            entries = of_entry(parameters[name])
            columns = self.columns(name, entries)
            total = added(total, owners, columns)
        return relative_to_mean(total)


def added(total: Tensor, owners: Tensor, rows: Tensor) -> Tensor:
    """The total of each unit (units,), with the sums of those rows (n, …) that are of units."""
    owners = owners.to(total.device)
    flat = rows.reshape(len(owners), -1)
    sums = flat.sum(1)
    mine = owners >= 0
    return total.index_add(
        dim=0,
        index=owners[mine],
        source=sums[mine].to(total),
    )


def shared_units(
    network: nn.Module, inputs: Tensor, taken: Iterable[str] = ()
) -> list[SharedUnits]:
    """The groups whose units can be removed one by one once their rows are zero, in order of
    execution, but for those that make or are made by the parameters `taken`; none for a network
    that cannot be traced.

    That they can is tried on a copy in which one unit of each is zero.
    """
    graph = _traced(network, inputs)
    if graph is None or writes_elsewhere(graph):
        return []
    walk = units_of(graph, inputs[:2])
    others = set(taken)
    free = []
    for candidates in _candidates(walk):
        group = candidates.group()
        if group is None:
            continue
        if others.isdisjoint(group.writers):
            free.append(group)
    return _tried(graph, inputs, _by_name(free))


def unknown_operations(network: nn.Module, inputs: Tensor) -> list[str]:
    """The operations, by name, of which no handler says what they do to units; none for a network
    that cannot be traced."""
    graph = _traced(network, inputs)
    if graph is None:
        return []
    walk = units_of(graph, inputs[:2])
    return list(dict.fromkeys(walk.unknown))


def why_untraceable(network: nn.Module, inputs: Tensor) -> str | None:
    """Why there is no graph of a network; None if there is one."""
    try:
        with evaluating(network):
            trace(network, inputs[:3])
    except UserError as error:
        return str(error)
    return None


def why_not_compact(network: nn.Module, inputs: Tensor) -> str | None:
    """Why compaction will refuse a network; None if it will not, as far as its structure goes."""
    try:
        with evaluating(network):
            graph = trace(network, inputs[:3])
            if any(isinstance(module, nn.MultiheadAttention) for module in graph.modules()):
                split_attention(copied(graph))
    except UserError as error:
        return str(error)
    return None


def _traced(network: nn.Module, inputs: Tensor) -> GraphModule | None:
    """The graph of a network; None for one that cannot be traced."""
    try:
        with evaluating(network):
            return trace(network, inputs[:3])
    except UserError:
        return None


def _by_name(groups: list[SharedUnits]) -> list[SharedUnits]:
    """Groups whose names differ: those of one layer are named by their first weight, and those of
    one weight by the axis too."""
    count = Counter(group.name for group in groups)
    found: dict[str, SharedUnits] = {}
    for group in groups:
        name = group.name
        if count[name] > 1:
            name = _first_weight(group)
        if name in found:
            name = f"{name}:{group.axes[name]}"
        found[name] = replace(group, name=name)
    return list(found.values())


def _first_weight(group: SharedUnits) -> str:
    names = list(group.writers)
    for name in names:
        if "weight" in name:
            return name
    return names[0]


@dataclass
class _Owners:
    """The unit of each row or column of parameters, by name, and along which axis those lie."""

    owners: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


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
        owner_of = self._owner_of()
        writers = _Owners()
        readers = _Owners()
        for name, axis, noted in _noted(self.walk):
            owners = owner_of[noted]
            if (owners == NONE).all():
                continue
            if not _is_parameter(self.walk.graph, name):
                continue
            side = readers
            if (name, axis) in self.walk.writing:
                side = writers
            if name in side.owners:
                return None
            side.owners[name] = owners
            side.axes[name] = axis
        if not writers.owners:
            return None
        first = next(iter(writers.owners))
        layer, _, _ = first.rpartition(".")
        return SharedUnits(
            name=layer or first,
            units=len(self.sets),
            writers=writers.owners,
            axes=writers.axes,
            readers=readers.owners,
            read_axes=readers.axes,
        )

    def _owner_of(self) -> Tensor:
        """The number of the set that each unit is of; and `NONE` at the end, for no unit."""
        units = self.walk.units
        size = units.count + 1
        found = torch.full((size,), NONE)
        for number, together in enumerate(self.sets):
            found[together] = number
        found[:-1] = found[units.roots()]
        return found


def _noted(walk: Walk) -> Iterator[tuple[str, int, Tensor]]:
    """The parameters and buffers by name, the axes along which they have units, and those."""
    for name, axes in walk.tensors.items():
        for axis, units in enumerate(axes):
            if units is None:
                continue
            if units.numel():
                yield name, axis, units


def _is_parameter(graph: GraphModule, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    module = graph.get_submodule(owner)
    tensor = getattr(module, leaf)
    return isinstance(tensor, nn.Parameter)


def _candidates(walk: Walk) -> list[_Candidates]:
    """Units that can go alone, and sets that stand for all of a head, by what they are rows of."""
    places = _places_of_units(walk)
    sets_at: dict[tuple[str, ...], list[Tensor]] = {}
    for units in _sets_that_may_go(walk, places):
        rows: set[str] = set()
        for root in units.tolist():
            rows.update(places.get(root, ()))
        if not rows:
            continue
        key = tuple(sorted(rows))
        sets = sets_at.setdefault(key, [])
        sets.append(units)
    found = []
    for sets in sets_at.values():
        found.append(_Candidates(walk, sets))
    return found


def _sets_that_may_go(walk: Walk, places: Iterable[int]) -> Iterator[Tensor]:
    """Each unit of `places` that can go alone, and then the sets that go at once, if the structure
    lets them."""
    may_go = walk.units.removable(structure_only=True)
    roots = walk.units.roots()
    columns = walk.units.columns(roots)
    within = walk.units.parts()
    for column in columns:
        within.update(column.tolist())
    for root in places:
        if root in within:
            continue
        if may_go[root]:
            yield torch.tensor([root])
    for together in (*columns, *walk.units.whole_sets(roots)):
        if may_go[together].all():
            yield together


def _places_of_units(walk: Walk) -> dict[int, list[str]]:
    """For each unit, by the one that it goes with, the parameters that it is rows of, with the
    axis."""
    roots = walk.units.roots()
    found: dict[int, list[str]] = {}
    for name, axis, units in _noted(walk):
        place = f"{name}:{axis}"
        there = units[units != NONE]
        different = roots[there].unique()
        for root in different.tolist():
            places = found.setdefault(root, [])
            places.append(place)
    return found


def _tried(graph: GraphModule, inputs: Tensor, groups: list[SharedUnits]) -> list[SharedUnits]:
    """Those groups of which a unit that is zero can go, tried with one of each."""
    zeroed = copied(graph)
    parameters = dict(zeroed.named_parameters(remove_duplicate=False))
    for group in groups:
        numbers = torch.arange(group.units)
        is_tried = numbers == _tried_unit(group)
        group.zero(parameters, is_tried)
    walk = units_of(zeroed, inputs[:2])
    gone = walk.units.removable()
    right = []
    for group in groups:
        if _is_gone(walk, gone, group):
            right.append(group)
    return right


def _tried_unit(group: SharedUnits) -> int:
    """The number of the unit that is tried: one with neighbours on both sides."""
    return group.units // 3


def _is_gone(walk: Walk, gone: Tensor, group: SharedUnits) -> bool:
    """Whether the unit that is tried goes from all that makes it."""
    for name, owners in group.writers.items():
        axis = group.axes.get(name, 0)
        units = walk.units_of(name, axis)
        if units is None:
            return False
        is_tried = owners == _tried_unit(group)
        tried = units[is_tried]
        if not gone[tried].all():
            return False
    return True
