"""Compaction: merging and removal, checked on real inputs, with a report of what was done."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from trainables.attention import split_attention
from trainables.compaction.blocks import drop_empty_branches
from trainables.compaction.coupled import remove_coupled_channels
from trainables.compaction.heads import remove_dead_heads
from trainables.compaction.layers import fold_batch_norms
from trainables.compaction.merge import MergePolicy, drop_idle_relus, merge_layers
from trainables.compaction.quick import make_quick
from trainables.compaction.units import remove_dead_units
from trainables.errors import TrialFailure
from trainables.graph import copied, trace
from trainables.measures import measure
from trainables.options import Options
from trainables.precision import all_of_float32

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
]


class Compaction(Options):
    """How a trained network is made smaller.

    `merge: always` merges every inactive layer into the next one, for the fewest layers; `smaller` only where that
    does not add non-zero weights, since the product of sparse matrices is denser than they are; `never` does not merge.
    `tolerance` is the largest relative difference of outputs that counts as equal. `approximate` also merges padded
    convolutions where only the border of the image comes out differently, after that check; it needs a refit.
    """

    enabled: bool = True
    merge: MergePolicy = "always"
    tolerance: float = Field(1e-4, gt=0)
    approximate: bool = False


@dataclass(frozen=True)
class Report:
    """What compaction did.

    `steps` are (layer, action, detail) in the order of doing; `difference` is the largest relative difference of outputs;
    `after` are the measures of the compact network (see `measures.measure`).
    """

    steps: tuple[tuple[str, Action, str], ...]
    difference: float
    after: dict[str, float]

    def count(self, action: Action) -> int:
        """How many steps were of this kind."""
        return sum(step[1] == action for step in self.steps)


@dataclass(frozen=True)
class Compacted:
    """A compact network and how it came about."""

    network: nn.Module
    """A traced graph (`torch.fx.GraphModule`), or a copy of the model as it was if compaction is off."""
    report: Report


def compact(model: nn.Module, inputs: Tensor, options: Compaction | None = None) -> Compacted:
    """A smaller network with the same outputs in evaluation mode; `model` is left as it is.

    Args:
        model: a trained network that torch.fx can trace.
        inputs: (N, *input_shape) real inputs, on which the two networks' outputs are compared.
        options: the defaults if None.

    Raises:
        TrialFailure: if the outputs differ by more than the tolerance, relative to the largest output.
        UserError: if the network cannot be traced, or has attention that cannot be taken apart.
    """
    options = options or Compaction()
    training = model.training
    model.eval()
    try:
        with all_of_float32():
            network = copied(trace(model) if options.enabled else model).eval()
            steps: list[tuple[str, Action, str]] = []
            if isinstance(network, fx.GraphModule) and options.enabled:
                steps = _transform(network, inputs, options)
                _tidy(network)
                make_quick(network)
            difference = relative_difference(model, network, inputs)
            if isinstance(network, fx.GraphModule) and options.approximate:
                steps += _merge_approximately(network, options)
                _tidy(network)
                network.recompile()
    finally:
        model.train(training)
    if not difference <= options.tolerance:  # NaN too
        raise TrialFailure(
            f"compaction changed the outputs by {difference:.2e} of their size; the tolerance is {options.tolerance:.0e}"
        )
    return Compacted(network, Report(tuple(steps), difference, measure(network, inputs)))


def _transform(network: fx.GraphModule, inputs: Tensor, options: Compaction) -> list[tuple[str, Action, str]]:
    """All exact steps, repeated until none applies; each removes something, so this ends."""
    steps: list[tuple[str, Action, str]] = [(name, "folded", "batch norm") for name in fold_batch_norms(network)]
    split_attention(network)
    apart: list[str] = []
    while True:
        units: list[tuple[str, Action, str]] = []
        for gone in remove_dead_units(network):
            action: Action = "removed" if gone.whole else "units removed"
            units.append((gone.layer, action, f"{gone.units} units, constant or unread"))
        found: list[tuple[str, Action, str]] = []
        for gone in remove_dead_heads(network):
            found.append((gone.layer, "removed" if gone.whole else "heads removed", f"{gone.units} heads, constant or unread"))
        found += [(name, "block removed", "its residual branch is zero") for name in drop_empty_branches(network)]
        found += [(name, "inactive", "its output is non-negative: ReLU dropped") for name in drop_idle_relus(network)]
        merged, apart = merge_layers(network, options.merge)
        found += [(name, "merged", "into the next layer") for name in merged]
        if not found:
            gone_together = remove_coupled_channels(network, inputs, options.tolerance)
            found += [
                (gone.layer, "units removed", f"{gone.units} channels, dead in each layer coupled to it")
                for gone in gone_together
            ]
        steps += [*units, *found]
        if not found:  # units are removed until there are none
            return steps + [(name, "kept apart", "merging would add weights") for name in apart]


def _merge_approximately(network: fx.GraphModule, options: Compaction) -> list[tuple[str, Action, str]]:
    merged, _ = merge_layers(network, options.merge, approximate=True)
    return [(name, "merged approximately", "into the next layer, but for the border") for name in merged]


def _tidy(network: fx.GraphModule) -> None:
    network.graph.lint()
    network.delete_all_unused_submodules()


@torch.no_grad()
def relative_difference(expected: nn.Module, actual: nn.Module, inputs: Tensor) -> float:
    """max |actual − expected| / max |expected| of the outputs on `inputs`; NaN if an output is NaN."""
    wanted, got = expected(inputs), actual(inputs)
    size = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float((got - wanted).abs().max() / size)
