"""Compaction: merging and removal, checked on real inputs, with a report of what was done."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.attention_heads import remove_dead_heads
from slimfront.trainables.compaction.blocks import drop_empty_branches
from slimfront.trainables.compaction.coupled import dead_units, remove_coupled_channels
from slimfront.trainables.compaction.exact import (
    in_float64_where_it_can,
    restore_types,
    type_of,
)
from slimfront.trainables.compaction.layers import clear_rounding, fold_batch_norms
from slimfront.trainables.compaction.merge import MergePolicy, drop_idle_relus, merge_layers
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.compaction.units import Removed, remove_dead_units
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.measures.measure import count_flops, measure
from slimfront.trainables.options import Options
from slimfront.trainables.precision import all_of_float32
from slimfront.trainables.structure.agreement import (
    EXACT,
    SEEN,
    Probe,
    difference_in_batches,
)
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import Conv, layers_of, note_ranks
from slimfront.trainables.tasks.evaluating import evaluating

Action = Literal[
    "folded",
    "inactive",
    "merged",
    "merged approximately",
    "kept apart",
    "units removed",
    "heads removed",
    "removed",
    "block removed",
    "zeros stay",
    "pruned",
]
Step = tuple[str, Action, str]
"""A layer, what became of it, and a detail; what was `pruned` before is told by who pruned it."""
Removal = Literal["units", "heads", "blocks", "channels"]
_REMOVALS: tuple[Removal, ...] = ("units", "heads", "blocks", "channels")

log = logging.getLogger(__name__)


class Compaction(Options):
    """How a trained network is made smaller.

    `merge: smaller` merges an inactive layer into the next one where that adds neither weights nor
    non-zero ones: the product of sparse matrices is denser than they are, and that of a bottleneck
    larger. `always` is for the fewest layers, even where the network becomes larger; `never` does
    not merge. `tolerance` is the largest difference of an output, relative to its spread, that
    counts as equal. `approximate` also merges padded convolutions where only the border of the
    image comes out differently, after that check; it needs a refit. With a `multiple`, such as 8,
    as many units of each layer that loses any stay as make their number a multiple, where it has so
    many: for hardware that is faster then.
    """

    enabled: bool = True
    merge: MergePolicy = "smaller"
    tolerance: float = Field(1e-4, gt=0)
    approximate: bool = False
    multiple: int = Field(1, ge=1, le=1024)

    @model_validator(mode="after")
    def _a_multiple_is_kept_by_compaction(self) -> Self:
        if self.multiple > 1 and not self.enabled:
            raise ValueError(
                "compaction.multiple is kept by compaction, which is not enabled; leave one out"
            )
        return self


@dataclass(frozen=True)
class Report:
    """What compaction did.

    `steps` are (layer, action, detail) in the order of doing; `difference` is the largest
    difference of an output, relative to its spread over the inputs; `after` are the measures of the
    compact network (see `measures.measure`).
    """

    steps: tuple[Step, ...]
    difference: float
    after: dict[str, float]

    def count(self, action: Action) -> int:
        """How many steps were of this kind."""
        return sum(step[1] == action for step in self.steps)


@dataclass(frozen=True)
class Compacted:
    """A compact network and how it came about."""

    network: nn.Module
    """A traced graph (`torch.fx.GraphModule`), or a copy of the model as it was if compaction is
    off."""
    report: Report

    @property
    def measures(self) -> dict[str, float]:
        """Of the compact network; see `measures.measure`."""
        return self.report.after


def compact(
    model: nn.Module,
    inputs: Tensor,
    options: Compaction | None = None,
    told: set[str] | None = None,
) -> Compacted:
    """A smaller network with the same outputs in evaluation mode; `model` is left as it is.

    What is folded, removed and merged is done and judged in float64, where the network can be run
    so, on a few of `inputs` and on fresh ones: a right step changes nothing there but the order of
    sums. A removal that changes more is undone: the units stay. The result, in the network's own
    type, is compared once more on all of `inputs`.

    Args:
        model: a trained network that torch.fx can trace, or torch.export.
        inputs: (N, *input_shape) real inputs, on which the two networks' outputs are compared.
        options: the defaults if None.
        told: the layers whose zero units were warned of before, which are not warned of again;
            those that are warned of here are added.

    Raises:
        TrialFailure: if the outputs differ in structure, shape or type, or by more than the
            tolerance, relative to their spread.
        UserError: if the network cannot be traced, or has attention that cannot be taken apart.
    """
    options = options or Compaction()
    with evaluating(model), all_of_float32():
        network, steps, apart = (
            _smaller(model, inputs, options) if options.enabled else (copied(model), [], 0.0)
        )
        if apart <= options.tolerance:
            apart = max(
                apart,
                relative_difference(model, network, inputs, options.tolerance),
                key=_badness,
            )
        if isinstance(network, fx.GraphModule) and options.approximate:
            steps += _merge_approximately(network, options)
            _tidy(network)
            network.recompile()
        if isinstance(network, fx.GraphModule):
            told = set() if told is None else told
            steps += _name_what_stays(network, inputs, options, told)
    if not apart <= options.tolerance:  # NaN too
        raise TrialFailure(
            f"compaction changed the outputs by {apart:.2e} of their spread; the tolerance is "
            f"{options.tolerance:.0e}"
        )
    return Compacted(network, Report(tuple(steps), apart, measure(network, inputs)))


def _name_what_stays(
    network: fx.GraphModule, inputs: Tensor, options: Compaction, told: set[str]
) -> list[Step]:
    """Names the layers that keep units without a weight, but for those that give the network's
    outputs; warns of those that were not `told` of, and do not stay for a multiple alone."""
    last = {
        str(node.target)
        for node in network.graph.nodes
        if node.op == "call_module" and _gives_output(node)
    }
    stay = {name: count for name, count in dead_units(network).items() if name not in last}
    wanted = _for_a_multiple(network, inputs, options, set(stay))
    new = [name for name in stay if name not in told | wanted]
    told.update(new)
    if new:
        named = ", ".join(f"{stay[name]:,} of '{name}'" for name in new[:10])
        log.warning(
            "units without a weight stay, since removing them would change the outputs, or nothing "
            "here can remove them: %s%s",
            named,
            " …" if len(new) > 10 else "",
        )
    steps: list[Step] = []
    for name, count in stay.items():
        why = f", for a multiple of {options.multiple}" if name in wanted else ""
        steps.append((name, "zeros stay", f"{count} units without a weight{why}"))
    return steps


def _for_a_multiple(
    network: fx.GraphModule, inputs: Tensor, options: Compaction, names: set[str]
) -> set[str]:
    """Which of these layers would keep no unit without a weight if any number were right."""
    if options.multiple == 1 or not names:
        return set()
    fewest, seen, exact = in_float64_where_it_can(network, inputs[:SEEN])
    remove_dead_units(fewest)
    remove_coupled_channels(fewest, seen, EXACT if exact else options.tolerance)
    return names - dead_units(fewest).keys()


def _gives_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _badness(apart: float) -> float:
    return math.inf if math.isnan(apart) else apart


def _smaller(
    model: nn.Module, inputs: Tensor, options: Compaction
) -> tuple[fx.GraphModule, list[Step], float]:
    """The network made smaller, what was done, and how far its outputs are from the model's where
    that was judged exactly.

    If they are too far, each kind of removal is tried alone, and left out if it is to blame.
    """
    inputs = inputs[:SEEN]
    original = traced_in_both_modes(model, inputs[:3])
    start = _start(original, inputs, options)
    network, steps = _reduced(start, options, _REMOVALS)
    apart = start.probe.difference(network, start.tolerance)
    if not apart <= start.tolerance:
        alone = options.model_copy(update={"merge": "never"})
        right = tuple(
            kind for kind in _REMOVALS if _is_right(_start(original, inputs, alone), alone, kind)
        )
        for kind in set(_REMOVALS) - set(right):
            log.warning("compaction removes no %s: that would change the outputs", kind)
        start = _start(original, inputs, options)
        network, steps = _reduced(start, options, right)
        apart = start.probe.difference(network, start.tolerance)
    steps = [*start.steps, *steps]
    restore_types(network, original)
    if options.merge != "always" and (grown := _grown(original, network, inputs, steps)):
        log.warning("compaction leaves the network as it is: it would have more %s", grown)
        network, steps, apart = _unchanged(original), [], 0.0
    return make_quick(network), steps, 0.0 if apart <= start.tolerance else apart


def _grown(before: nn.Module, after: nn.Module, inputs: Tensor, steps: list[Step]) -> str:
    """Which sizes grew, in words; merging and removal make none of them larger, unless weights that
    are shared come apart.

    FLOPs are counted only where merged convolutions could have more of them: where there are
    others, they follow from weights.
    """
    merged = any(step[1] == "merged" for step in steps) and any(
        isinstance(m, Conv) for m in after.modules()
    )
    sizes = []
    for network in (before, after):
        sizes.append(
            {
                "parameters": sum(p.numel() for p in network.parameters()),
                "non-zero parameters": sum(int(p.count_nonzero()) for p in network.parameters()),
                "FLOPs": count_flops(network, inputs[:1]) if merged else 0,
            }
        )
    return " and ".join(name for name in sizes[0] if sizes[1][name] > sizes[0][name])


def _unchanged(original: fx.GraphModule) -> fx.GraphModule:
    network = copied(original).eval()
    split_attention(network)
    return network


@dataclass(frozen=True)
class _Start:
    """A traced network with its batch norms folded, in float64 if it can be run so: what units are
    removed from, in place."""

    network: fx.GraphModule
    inputs: Tensor
    probe: Probe
    """What other networks must compute."""
    tolerance: float
    """How far they may be from it."""
    steps: tuple[Step, ...]


def _start(original: fx.GraphModule, inputs: Tensor, options: Compaction) -> _Start:
    network, exact_inputs, exact = in_float64_where_it_can(original, inputs)
    tolerance = EXACT if exact else options.tolerance
    split_attention(network)
    note_ranks(network, exact_inputs)
    folded: list[str] = []
    if any(layer.norm is not None for layer in layers_of(network)):
        before = Probe(network, exact_inputs, briefly=True)
        folded = fold_batch_norms(network)
        if not before.agrees(_compiled(network), tolerance):
            log.warning("compaction folds no batch norms: that would change the outputs")
            network, folded = in_float64_where_it_can(original, inputs)[0], []
            split_attention(network)
        clear_rounding(network, folded, type_of(original))
    return _Start(
        network,
        exact_inputs,
        Probe(network, exact_inputs),
        tolerance,
        tuple((name, "folded", "batch norm") for name in folded),
    )


def _is_right(start: _Start, options: Compaction, kind: Removal) -> bool:
    return start.probe.agrees(_reduced(start, options, (kind,))[0], start.tolerance)


def _reduced(
    start: _Start, options: Compaction, removals: tuple[Removal, ...]
) -> tuple[fx.GraphModule, list[Step]]:
    """The network after all exact steps, repeated until none applies; each removes something, so
    this ends."""
    network = start.network
    steps: list[Step] = []
    while True:
        found: list[Step] = []
        units: list[Step] = []
        if "units" in removals:
            units = _removed(remove_dead_units(network, options.multiple), "units")
        if "heads" in removals:
            found += _removed(remove_dead_heads(network, options.multiple), "heads")
        if "blocks" in removals:
            dropped = drop_empty_branches(network, start.inputs)
            found += [(name, "block removed", "its residual branch is zero") for name in dropped]
        found += [
            (name, "inactive", "its output is non-negative: ReLU dropped")
            for name in drop_idle_relus(network)
        ]
        merged, apart = merge_layers(network, options.merge)
        found += [(name, "merged", "into the next layer") for name in merged]
        if not found and "channels" in removals:
            gone_together = remove_coupled_channels(
                network, start.inputs, start.tolerance, start.probe, options.multiple
            )
            found += [
                (
                    gone.layer,
                    "units removed",
                    f"{gone.units} units, of which nothing is read",
                )
                for gone in gone_together
            ]
        steps += [*units, *found]
        if not found:  # units are removed until there are none
            _tidy(network)
            steps += [(name, "kept apart", "merging would add weights") for name in apart]
            return _compiled(network), steps


def _removed(removed: Iterable[Removed], what: Literal["units", "heads"]) -> list[Step]:
    action: Action = "units removed" if what == "units" else "heads removed"
    return [
        (
            gone.layer,
            "removed" if gone.whole else action,
            f"{gone.units} {what}, constant or unread",
        )
        for gone in removed
    ]


def _compiled(network: fx.GraphModule) -> fx.GraphModule:
    network.recompile()
    return network


def _merge_approximately(network: fx.GraphModule, options: Compaction) -> list[Step]:
    merged, _ = merge_layers(network, options.merge, approximate=True)
    return [
        (name, "merged approximately", "into the next layer, but for the border") for name in merged
    ]


def _tidy(network: fx.GraphModule) -> None:
    network.graph.lint()
    network.delete_all_unused_submodules()


def relative_difference(
    expected: nn.Module, actual: nn.Module, inputs: Tensor, tolerance: float
) -> float:
    """The largest difference of an output on `inputs`, and on one and three of them, relative to
    its spread.

    See `agreement.difference_in_batches`.
    """
    return difference_in_batches(expected, actual, inputs, tolerance)
