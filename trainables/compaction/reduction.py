"""The exact steps of compaction, one after another, until none applies."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import GraphModule

from slimfront.trainables.compaction.attention_heads import remove_dead_heads
from slimfront.trainables.compaction.blocks import drop_empty_branches, drop_zero_summands
from slimfront.trainables.compaction.coupled import has_zeros, remove_coupled_channels
from slimfront.trainables.compaction.exact import in_float64_where_it_can, type_of
from slimfront.trainables.compaction.layers import clear_rounding, fold_batch_norms
from slimfront.trainables.compaction.merging.merge import MergePolicy, drop_idle_relus, merge_layers
from slimfront.trainables.compaction.merging.norms import fold_remaining_norms
from slimfront.trainables.compaction.merging.runs import chain, merge_run
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.report import Action, Step
from slimfront.trainables.compaction.units import Removed, remove_dead_units
from slimfront.trainables.compaction.unread import drop_unread
from slimfront.trainables.structure.agreement import EXACT, Probe
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import layers_of
from slimfront.trainables.structure.tracing.shapes import shapes_of
from slimfront.trainables.structure.tracing.trace import note_ranks

Removal = Literal["units", "heads", "blocks", "channels"]
REMOVALS: tuple[Removal, ...] = ("units", "heads", "blocks", "channels")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A traced network with its batch norms folded, in float64 if it can be run so: what units are
    removed from, in place."""

    network: GraphModule
    inputs: Tensor
    probe: Probe
    """What other networks must compute."""
    tolerance: float
    """How far they may be from it."""
    steps: tuple[Step, ...]


def start_of(original: GraphModule, inputs: Tensor, options: Compaction) -> Start:
    """A copy of a traced network from which units can be removed."""
    network, exact_inputs, exact = in_float64_where_it_can(original, inputs)
    tolerance = EXACT if exact else options.tolerance
    split_attention(network)
    note_ranks(network, exact_inputs)
    folded: list[str] = []
    if any(layer.norm is not None for layer in layers_of(network)):
        before = Probe(network, exact_inputs, briefly=True)
        folded = fold_batch_norms(network)
        network.recompile()
        if not before.agrees(network, tolerance):
            log.warning("compaction folds no batch norms: that would change the outputs")
            network, _, _ = in_float64_where_it_can(original, inputs)
            split_attention(network)
            folded = []
        clear_rounding(network, folded, type_of(original))
    steps: list[Step] = []
    for name in folded:
        steps.append((name, "folded", "batch norm"))
    return Start(
        network=network,
        inputs=exact_inputs,
        probe=Probe(network, exact_inputs),
        tolerance=tolerance,
        steps=tuple(steps),
    )


def is_reduced(original: GraphModule, inputs: Tensor, options: Compaction) -> bool:
    """Whether none of the exact steps applies to a traced network, as where one that is compact has
    lost single weights: a glance that needs neither float64 nor a comparison of outputs.

    False where that takes more than a glance: a unit without a weight may stay for its readers'
    sake, and layers that would cost more as one are named.
    """
    network = copied(original)
    if any(layer.norm is not None for layer in layers_of(network)) or split_attention(network):
        return False
    if has_zeros(network) or remove_dead_units(network, options.multiple):
        return False
    if remove_dead_heads(network, options.multiple) or drop_empty_branches(network, inputs):
        return False
    merged, apart = _merge(network, inputs, options.merge)
    if merged or apart or drop_zero_summands(network, inputs):
        return False
    return not (fold_remaining_norms(network) or drop_unread(network))


def reduced(
    start: Start, options: Compaction, removals: tuple[Removal, ...]
) -> tuple[GraphModule, list[Step]]:
    """The network after all exact steps, repeated until none applies; each removes something, so
    this ends."""
    network = start.network
    steps: list[Step] = []
    while True:
        if "units" in removals:  # until there are none
            gone = remove_dead_units(network, options.multiple)
            steps += _removed(gone, "units")
        found, apart = _found_beside_units(start, options, removals)
        steps += found
        if not found:
            break
    for name in fold_remaining_norms(network):
        steps.append((name, "folded", "batch norm"))
    for name in drop_unread(network):
        steps.append((name, "removed", "nothing reads it"))
    _tidy(network)
    for name in apart:
        steps.append((name, "kept apart", "merging would add weights"))
    network.recompile()
    return network, steps


def _found_beside_units(
    start: Start, options: Compaction, removals: tuple[Removal, ...]
) -> tuple[list[Step], list[str]]:
    """Heads, blocks and layers that go; where there are none, what is found by following units.
    Also the names of layers that would have cost more as one."""
    network = start.network
    found: list[Step] = []
    if "heads" in removals:
        gone = remove_dead_heads(network, options.multiple)
        found += _removed(gone, "heads")
    if "blocks" in removals:
        for name in drop_empty_branches(network, start.inputs):
            found.append((name, "block removed", "its residual branch is zero"))
    merged, apart = _merge(network, start.inputs, options.merge)
    found += merged
    if not found and "blocks" in removals:
        for name in drop_zero_summands(network, start.inputs):
            found.append((name, "block removed", "what it adds is zero"))
    if not found and "channels" in removals:
        found += _remove_channels(start, options)
    return found, apart


def _merge(
    network: GraphModule, inputs: Tensor, policy: MergePolicy
) -> tuple[list[Step], list[str]]:
    """Drops ReLUs that do nothing, and merges layers; also the names of those that would have cost
    more as one."""
    steps: list[Step] = []
    for name in drop_idle_relus(network):
        steps.append((name, "inactive", "its output is non-negative: ReLU dropped"))
    merged, apart = merge_layers(network, policy)
    for name in merged:
        steps.append((name, "merged", "into the next layer"))
    if policy != "never":
        steps += _merge_chains(network, inputs)
    return steps, apart


def _merge_chains(network: GraphModule, inputs: Tensor) -> list[Step]:
    """Merges three layers or more where no two of them would merge: an expansion, a depthwise
    convolution and a projection."""
    steps: list[Step] = []
    while True:
        run = chain(network, lambda: shapes_of(network, inputs))
        if run is None:
            return steps
        for layer in run.layers[:-1]:
            steps.append((layer.name, "merged", f"into '{run.last.name}'"))
        merge_run(network, run)
        network.recompile()


def _removed(removed: Iterable[Removed], what: Literal["units", "heads"]) -> list[Step]:
    in_part: Action = "heads removed"
    if what == "units":
        in_part = "units removed"
    steps: list[Step] = []
    for gone in removed:
        action = in_part
        if gone.whole:
            action = "removed"
        detail = f"{gone.units} {what}, constant or unread"
        steps.append((gone.layer, action, detail))
    return steps


def _remove_channels(start: Start, options: Compaction) -> list[Step]:
    """Removes units that several layers share."""
    removed = remove_coupled_channels(
        start.network,
        start.inputs,
        tolerance=start.tolerance,
        probe=start.probe,
        multiple=options.multiple,
    )
    steps: list[Step] = []
    for gone in removed:
        detail = f"{gone.units} units, of which nothing is read"
        steps.append((gone.layer, "units removed", detail))
    return steps


def merge_approximately(network: GraphModule, policy: MergePolicy) -> list[Step]:
    """Merges convolutions where only the border of the image comes out differently, in place."""
    merged, _ = merge_layers(network, policy, approximate=True)
    _tidy(network)
    network.recompile()
    detail = "into the next layer, but for the border"
    return [(name, "merged approximately", detail) for name in merged]


def _tidy(network: GraphModule) -> None:
    network.graph.lint()
    network.delete_all_unused_submodules()
