"""Takes whole layers out of a network, one by one: each time the one that a criterion finds worth
least."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
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

log = logging.getLogger(__name__)

Agree = Callable[[list[float]], list[float]]


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
    steps = []
    for layer, step in worth_least(graph, batches, asked, loss):
        take_out(graph, layer)
        steps.append(step)
    return graph, steps


@torch.no_grad()
def worth_least(
    graph: GraphModule, batches: Sequence[Batch], asked: Asked, loss: Loss | None
) -> Iterator[tuple[WholeLayer, Step]]:
    """The layers that are asked for, one by one, each with what to say of it. Whoever takes one
    takes it out of `graph`: the next is judged in what is left.

    Raises:
        UserError: as `without_layers`.
    """
    sample = batches[0].inputs[:3]
    kind = find_criterion(asked.criterion)
    judge = kind(graph, batches, loss)
    enough = _enough(graph, batches, asked)
    _check_names(graph, asked)
    steps: list[Step] = []
    while (missing := enough(graph, len(steps))) is not None:
        layers = whole_layers(graph, sample)
        found = [layer for layer in layers if layer.name not in asked.exclude]
        if not found and asked.at_most:
            log.warning(
                "%s: %s layers were taken out; no more of this network can be%s",
                asked.words,
                len(steps),
                missing,
            )
            return
        if not found:
            raise UserError(f"{asked.words}: {_not_enough(steps)}{missing}")
        worth = judge.worth(graph, found)
        if asked.agree is not None:
            worth = asked.agree(worth)
        least = min(worth)
        if least == math.inf:
            raise UserError(f"{asked.words}: {_not_judged(asked.criterion, found)}")
        chosen = found[worth.index(least)]
        step: Step = (chosen.name, "pruned", f"{chosen.what}: {judge.told(least)}")
        steps.append(step)
        yield chosen, step
    if not steps:
        log.warning("%s: no layer goes, since the network meets it as it is", asked.words)


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


def _enough(
    graph: GraphModule, batches: Sequence[Batch], asked: Asked
) -> Callable[[GraphModule, int], str | None]:
    """A function of a network and of how many layers went: None if that is enough, else what to say
    where no more can."""
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
