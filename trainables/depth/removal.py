"""Takes whole layers out of a network, one by one: each time the one that a criterion finds worth
least."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.compaction.whole_layers import WholeLayer, take_out, whole_layers
from slimfront.trainables.depth.base import OUTPUTS, Batch, Criterion, Loss, find_criterion
from slimfront.trainables.errors import UserError, first_few


def without_layers(
    network: nn.Module,
    batches: Sequence[Batch],
    count: int,
    loss: Loss | None = None,
    *,
    exclude: Sequence[str] = (),
    criterion: str = OUTPUTS,
    asked: str,
    at_most: bool = False,
) -> tuple[GraphModule, list[Step]]:
    """The traced network without `count` layers or blocks; `network` stays as it is, and batch
    norms keep the statistics that they have.

    Args:
        batches: inputs (N, …), with targets where there is a loss.
        exclude: the names of layers that stay.
        criterion: of `depth.CRITERIA`.
        asked: how the user has asked for it, for errors.
        at_most: whether fewer go where there are not so many.

    Returns:
        The network, and what went by name, in the order of going.

    Raises:
        UserError: if the network cannot be traced, there are not so many, or the criterion is none,
            needs what is not given, or judges none of those that are left.
    """
    sample = batches[0].inputs[:3]
    kind = find_criterion(criterion)
    graph = traced_in_both_modes(network, sample)
    with torch.no_grad():
        judge = kind(graph, batches, loss)
        steps: list[Step] = []
        for _ in range(count):
            layers = whole_layers(graph, sample)
            found = [layer for layer in layers if layer.name not in exclude]
            if not found and at_most:
                break
            if not found:
                raise UserError(f"{asked}: {_not_enough(steps)}")
            worth = judge.worth(graph, found)
            if min(worth) == math.inf:
                raise UserError(f"{asked}: {_not_judged(criterion, found)}")
            steps.append(_take_least_out(graph, found, worth, judge))
    return graph, steps


def _take_least_out(
    graph: GraphModule, layers: list[WholeLayer], worth: list[float], judge: Criterion
) -> Step:
    """Takes out the layer that is worth least."""
    least = min(worth)
    chosen = layers[worth.index(least)]
    take_out(graph, chosen)
    return chosen.name, "pruned", f"{chosen.what}: {judge.told(least)}"


def _not_enough(steps: list[Step]) -> str:
    if not steps:
        return (
            "there is no residual branch and no layer between activations that can be taken out of "
            "this network"
        )
    names = first_few([f"'{step[0]}'" for step in steps])
    return f"no more than {len(steps)} can be taken out of this network: {names}"


def _not_judged(criterion: str, layers: list[WholeLayer]) -> str:
    names = first_few([f"'{layer.name}'" for layer in layers])
    return (
        f"the criterion '{criterion}' says nothing of what could go ({names}); take another, such "
        f"as '{OUTPUTS}'"
    )
