"""Takes whole layers out of a network, one by one: each time the one whose removal changes the
outputs least."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.compaction.whole_layers import (
    WholeLayer,
    Without,
    take_out,
    whole_layers,
)
from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.post_training.amount import Amount
from slimfront.trainables.torch_internals import flattened

Batches = Sequence[Tensor]
"""Inputs (N, …) each."""
Leaves = list[Tensor]
"""The tensors of what a network gives for a batch."""


def without_layers(
    network: nn.Module, inputs: Batches, amount: Amount, exclude: tuple[str, ...] = ()
) -> tuple[fx.GraphModule, list[Step]]:
    """The traced network without as many layers or blocks as `amount` says; `network` stays as it
    is.

    How much the outputs change is the sum of squares of the difference to those of `network`,
    relative to the sum of squares of their own deviation from their mean over the batch. It is
    taken with the statistics that batch norms have.

    Args:
        inputs: batches (N, …).
        exclude: the names of layers that stay.

    Returns:
        The network, and what went by name, in the order of going.

    Raises:
        UserError: if the network cannot be traced, or there are not so many.
    """
    sample = inputs[0][:3]
    graph = traced_in_both_modes(network, sample)
    with torch.no_grad():
        wanted = [_leaves(network(batch)) for batch in inputs]
        steps: list[Step] = []
        for _ in range(int(amount.value)):
            layers = whole_layers(graph, sample)
            found = [layer for layer in layers if layer.name not in exclude]
            if not found:
                raise UserError(f"{amount}: {_not_enough(steps)}")
            steps.append(_take_least_out(graph, found, inputs, wanted))
    return graph, steps


def _take_least_out(
    graph: fx.GraphModule, layers: list[WholeLayer], inputs: Batches, wanted: list[Leaves]
) -> Step:
    """Takes out the layer whose removal changes the outputs least."""
    changes = [_change(graph, layer, inputs, wanted) for layer in layers]
    least = min(changes)
    place = changes.index(least)
    chosen = layers[place]
    take_out(graph, chosen)
    detail = f"{chosen.what}: the outputs change by {math.sqrt(least):.1%}"
    return chosen.name, "pruned", detail


def _not_enough(steps: list[Step]) -> str:
    if not steps:
        return (
            "there is no residual branch and no layer between activations that can be taken out of "
            "this network"
        )
    names = first_few([f"'{step[0]}'" for step in steps])
    return f"no more than {len(steps)} can be taken out of this network: {names}"


def _change(
    graph: fx.GraphModule, layer: WholeLayer, inputs: Batches, wanted: list[Leaves]
) -> float:
    """How much the outputs change without a layer, relative; infinite where they are no numbers."""
    apart = 0.0
    spread = 0.0
    for batch, right in zip(inputs, wanted, strict=True):
        outputs = Without(graph, layer).run(batch)
        for one, other in zip(_leaves(outputs), right, strict=True):
            apart += _sum_of_squares(one - other)
            mean = other.mean(0, keepdim=True)
            spread += _sum_of_squares(other - mean)
    change = apart / max(spread, 1e-30)
    return change if math.isfinite(change) else math.inf


def _sum_of_squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())


def _leaves(outputs: Any) -> Leaves:
    """The tensors of real numbers among outputs, in float32 or more."""
    leaves, _ = flattened(outputs)
    found = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        is_wide = leaf.dtype == torch.float64
        found.append(leaf if is_wide else leaf.float())
    return found
