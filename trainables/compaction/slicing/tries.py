"""Units are taken out of copies of a network, until one computes what the network does."""

import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.slicing.calls import new_calls
from slimfront.trainables.compaction.slicing.layers import settle_modules, slice_tensors
from slimfront.trainables.compaction.slicing.sizes import follow_inputs
from slimfront.trainables.compaction.slicing.stays import CannotSlice, Slices
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.coupling.graph_of_units import units_of
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Walk
from slimfront.trainables.structure.tracing.exported import writes_elsewhere


def sliced(
    network: GraphModule, inputs: Tensor, agrees: Callable[[nn.Module], bool], multiple: int = 1
) -> dict[str, int] | None:
    """Takes out of a network, in place, all units that can go without a change of its outputs; how
    many rows each layer lost, by name; None if nothing was done, and not all of it is known.

    What cannot be taken out since a size is written into the code stays. Each try is made on a
    copy, and kept if it `agrees`; else nothing is done. As many units stay as make the number of
    each layer's a `multiple`, if there are so many.
    """
    if writes_elsewhere(network):
        return None
    two = torch.arange(2) % len(inputs)
    stuck: list[str] = []
    while True:
        copy = copied(network)
        walk = units_of(copy, inputs[two])
        _keep_around(walk, stuck)
        rows = [units for _, units in _made(walk)]
        gone = walk.units.removable(rows=rows, multiple=multiple)
        lost = _lost(walk, gone)
        if not lost:
            if stuck or walk.unknown:
                return None
            return {}
        slices = Slices(
            network=copy,
            walk=walk,
            gone=gone,
            by_inputs=follow_inputs(copy, walk, inputs),
        )
        try:
            _take_out(slices)
        except CannotSlice as error:
            if error.node.name in stuck:
                return None  # that its units stay does not help
            stuck.append(error.node.name)
            continue
        if not agrees(copy):
            return None
        _take_over(network, copy)
        return lost


def _keep_around(walk: Walk, names: list[str]) -> None:
    """Has all units stay of what nodes of these names read and make."""
    for node in walk.graph.graph.nodes:
        if node.name not in names:
            continue
        around = [walk.known[node]]
        for source in node.all_input_nodes:
            around.append(walk.known[source])
        walk.stay(around, "a size in the code")


def _made(walk: Walk) -> Iterator[tuple[str, Tensor]]:
    """Each layer by name, with the units along each axis of its parameters along which it makes
    them."""
    for name, axes in walk.tensors.items():
        owner, _, _ = name.rpartition(".")
        for axis, units in enumerate(axes):
            if units is None:
                continue
            makes = axis == 0 or (name, axis) in walk.writing
            if makes:
                yield owner or name, units


def _lost(walk: Walk, gone: Tensor) -> dict[str, int]:
    """How many of the units that it makes each layer loses."""
    found: dict[str, int] = {}
    for owner, units in _made(walk):
        is_unit = units != NONE
        goes = gone[units] & is_unit
        count = int(goes.sum())
        if count == 0:
            continue
        before = found.get(owner, 0)
        found[owner] = max(before, count)
    return found


def _take_out(slices: Slices) -> None:
    """Takes units out of a network, in place.

    Raises:
        CannotSlice: if a size in the code cannot be changed; nothing was changed then.
    """
    network = slices.network
    for node, call in new_calls(slices).items():
        call.write(node)
    slice_tensors(slices)
    settle_modules(slices)
    for node in list(network.graph.nodes):
        if node.op != "call_module":
            _recount(slices, node)
    network.graph.eliminate_dead_code()
    network.recompile()


def _recount(slices: Slices, node: Node) -> None:
    """Has a mean over units count those that went."""
    share = 1.0
    for units in slices.counted_units(node.name):
        kept = slices.kept(units)
        share_kept = kept.double().mean()
        share *= float(share_kept)
    if share == 1:
        return
    graph = slices.network.graph
    with graph.inserting_after(node):
        scaled = graph.call_function(operator.mul, (node, share))

    def reads_it_unscaled(user: Node) -> bool:
        return user is not scaled

    node.replace_all_uses_with(scaled, reads_it_unscaled)


def _take_over(network: GraphModule, other: GraphModule) -> None:
    """Makes a network what another one is."""
    for name, _ in list(network.named_children()):
        delattr(network, name)
    held = (
        *other.named_children(),
        *other.named_parameters(recurse=False),
        *other.named_buffers(recurse=False),
    )
    for name, part in held:
        setattr(network, name, part)
    network.graph = other.graph
