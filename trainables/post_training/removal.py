"""Takes whole layers out of a network, one by one: each time the one whose removal changes the
outputs least."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.compact import Step
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import (
    WholeLayer,
    Without,
    take_out,
    whole_layers,
)
from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.post_training.amount import Amount
from slimfront.trainables.torch_internals import flattened


def without_layers(
    network: nn.Module, inputs: Sequence[Tensor], amount: Amount, exclude: tuple[str, ...] = ()
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
            found = [each for each in whole_layers(graph, sample) if each.name not in exclude]
            if not found:
                raise UserError(f"{amount}: {_not_enough(steps)}")
            changes = [_change(graph, each, inputs, wanted) for each in found]
            least = min(changes)
            chosen = found[changes.index(least)]
            take_out(graph, chosen)
            detail = f"{chosen.what}: the outputs change by {math.sqrt(least):.1%}"
            steps.append((chosen.name, "pruned", detail))
    return graph, steps


def _not_enough(steps: list[Step]) -> str:
    if not steps:
        return (
            "there is no residual branch and no layer between activations that can be taken out of "
            "this network"
        )
    names = first_few([f"'{step[0]}'" for step in steps])
    return f"no more than {len(steps)} can be taken out of this network: {names}"


def _change(
    graph: fx.GraphModule, layer: WholeLayer, inputs: Sequence[Tensor], wanted: list[list[Tensor]]
) -> float:
    """How much the outputs change without a layer, relative; infinite where they are no numbers."""
    apart = spread = 0.0
    for batch, right in zip(inputs, wanted, strict=True):
        made = _leaves(Without(graph, layer).run(batch))
        for one, other in zip(made, right, strict=True):
            apart += float((one - other).square().sum())
            spread += float((other - other.mean(0, keepdim=True)).square().sum())
    found = apart / max(spread, 1e-30)
    return found if math.isfinite(found) else math.inf


def _leaves(outputs: Any) -> list[Tensor]:
    """The tensors of real numbers among outputs, in float32 or more."""
    leaves, _ = flattened(outputs)
    real = [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]
    return [one.float() if one.dtype != torch.float64 else one for one in real]
