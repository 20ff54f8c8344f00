"""Takes whole layers out of a network, one by one: each time the one that a criterion finds worth
least. Where a target is met so, what need not have gone for it is put back, the last first: layers
that are worth little may be cheap, and one that went later may be enough without them."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.compaction.whole_layers import WholeLayer, take_out, whole_layers
from slimfront.trainables.depth.base import OUTPUTS, Batch, Loss, find_criterion
from slimfront.trainables.depth.target import Judge, Target
from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.measures.latency import Latency
from slimfront.trainables.options import suggest
from slimfront.trainables.structure.copying import copied

log = logging.getLogger(__name__)

Agree = Callable[[list[float]], list[float]]
Enough = Callable[[GraphModule, int], str | None]
"""Of a network and of how many layers went: None if that is enough, else what to say where no more
can."""


@dataclass(frozen=True)
class Asked:
    """Which layers are to go: so many, or as many as a target takes."""

    count: int
    """0 if there is a target."""
    words: str
    """How the user has asked for it, for errors."""
    criterion: str = OUTPUTS
    """Of `depth.CRITERIA`."""
    exclude: Sequence[str] = ()
    """The names of layers that stay."""
    at_most: bool = False
    """Whether fewer go where there are not so many."""
    target: Target | None = None
    latency: Latency | None = None
    """How times are taken, if the target is one."""
    compaction: Compaction | None = None
    """How networks are made compact that are judged by a target."""
    agree: Agree | None = None
    """What all processes of a training find layers worth, of what this one does; itself if None."""


def without_layers(
    network: nn.Module,
    batches: Sequence[Batch],
    asked: Asked,
    loss: Loss | None = None,
) -> tuple[GraphModule, list[Step]]:
    """The traced network without the layers that are asked for; `network` stays as it is, and batch
    norms keep the statistics that they have.

    Args:
        batches: inputs (N, …), with targets where there is a loss.

    Returns:
        The network, and what went by name, in the order of going.

    Raises:
        UserError: if the network cannot be traced, there are not so many, or the criterion is none,
            needs what is not given, or judges none of those that are left.
    """
    sample = batches[0].inputs[:3]
    graph = traced_in_both_modes(network, sample)
    steps = worth_least(graph, batches, asked, loss)
    for layer in found_again(graph, sample, steps):
        take_out(graph, layer)
    return graph, steps


@torch.no_grad()
def worth_least(
    graph: GraphModule,
    batches: Sequence[Batch],
    asked: Asked,
    loss: Loss | None,
    *,
    merging: bool = True,
) -> list[Step]:
    """The layers that are asked for, in the order of going, each judged in what is left of the
    network without those before it. `graph` stays as it is.

    Args:
        merging: whether layers that are to be one are one while the others are judged.

    Raises:
        UserError: as `without_layers`.
    """
    sample = batches[0].inputs[:3]
    kind = find_criterion(asked.criterion)
    judge = kind(graph, batches, loss)
    enough = _enough(graph, batches, asked)
    _check_names(graph, asked)
    left = copied(graph)
    steps: list[Step] = []
    while (missing := enough(left, len(steps))) is not None:
        layers = whole_layers(left, sample)
        found = [layer for layer in layers if layer.name not in asked.exclude]
        if not found and asked.at_most:
            log.warning(
                "%s: %s layers were taken out; no more of this network can be%s",
                asked.words,
                len(steps),
                missing,
            )
            return steps
        if not found:
            raise UserError(f"{asked.words}: {_not_enough(steps)}{missing}")
        worth = judge.worth(left, found)
        if asked.agree is not None:
            worth = asked.agree(worth)
        least = min(worth)
        if least == math.inf:
            raise UserError(f"{asked.words}: {_not_judged(asked.criterion, found)}")
        chosen = found[worth.index(least)]
        step: Step = (chosen.name, "pruned", f"{chosen.what}: {judge.told(least)}")
        steps.append(step)
        take_out(left, chosen, merging=merging)
    if not steps:
        log.warning("%s: no layer goes, since the network meets it as it is", asked.words)
    if asked.target is not None:
        return _needed(graph, sample, steps, enough, merging=merging)
    return steps


def found_again(graph: GraphModule, sample: Tensor, steps: Sequence[Step]) -> Iterator[WholeLayer]:
    """The layers of these steps in `graph`, one by one: whoever takes one takes it out, and the
    next is looked for in what is left.

    Raises:
        LookupError: if there is none such: it was what those before it have left.
    """
    for name, _, detail in steps:
        for layer in whole_layers(graph, sample):
            if layer.name == name and detail.startswith(f"{layer.what}: "):
                yield layer
                break
        else:
            raise LookupError(name)


def _needed(
    graph: GraphModule, sample: Tensor, steps: list[Step], enough: Enough, *, merging: bool
) -> list[Step]:
    """These steps without those that a target is met without. The last of them it is not."""
    for step in reversed(steps[:-1]):
        fewer = [other for other in steps if other is not step]
        left = copied(graph)
        try:
            for layer in found_again(left, sample, fewer):
                take_out(left, layer, merging=merging)
        except LookupError:
            continue
        if enough(left, len(fewer)) is None:
            steps = fewer
    return steps


def _check_names(graph: GraphModule, asked: Asked) -> None:
    """Raises UserError if a name that is to stay is of nothing in the network."""
    known = {name for name, _ in graph.named_modules() if name}
    for name in asked.exclude:
        within = any(other.startswith(f"{name}.") for other in known)
        if name not in known and not within:
            raise UserError(
                f"{asked.words}: exclude: '{name}' is no layer of the network; "
                f"{suggest(name, known)}"
            )


def _enough(graph: GraphModule, batches: Sequence[Batch], asked: Asked) -> Enough:
    if asked.target is None:
        return lambda _, gone: None if gone == asked.count else ""
    inputs = batches[0].inputs
    judge = Judge(asked.target, graph, inputs, asked.latency, asked.compaction)

    def missing(network: GraphModule, _gone: int) -> str | None:
        missed = judge.missed(network)
        is_missed = [float(bool(missed))]
        if asked.agree is not None:
            is_missed = asked.agree(is_missed)
        if not is_missed[0]:
            return None
        return f"; {' and '.join(missed)} then"

    return missing


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
