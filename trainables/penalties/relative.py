"""Strengths that mean the same in every training.

How much a proximal penalty removes depends on the learning rate, the number of steps and the size
of the weights, so that a strength which empties one network does nothing to another. In units of
the training it does not: with strength 1 the proximal steps of all of it together would take the
penalty to about zero if the loss did not resist, that is twice what halves it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties.base import ActiveGroups, GroupPenalty, Penalty

_HALVINGS = 40


def absolute(
    penalties: Mapping[str, Penalty],
    network: nn.Module,
    sample: Tensor,
    total_step: Callable[[Penalty], float],
) -> dict[str, Penalty]:
    """The penalties with strengths as the proximal steps take them, where they are relative.

    Args:
        network: as it is when its training begins.
        sample: a batch, as for `Penalty.attach`.
        total_step: the sum of the step sizes of a training, each times the share of the full
            strength then (see `Penalty.scale`).

    Raises:
        UserError: if a penalty that is relative has no size.
    """
    found = dict(penalties)
    for name, options in penalties.items():
        if not isinstance(options, GroupPenalty) or not (options.relative and options.on):
            continue
        total = total_step(options)
        if total <= 0:
            raise UserError(
                f"penalties.{name}.relative: its full strength is never reached in this training; "
                "shorten warmup"
            )
        unit = _emptying(name, options, network, sample) / total
        found[name] = options.model_copy(
            update={
                "relative": False,
                "strength": options.strength * unit,
                "layers": {layer: own * unit for layer, own in options.layers.items()},
            }
        )
    return found


@torch.no_grad()
def _emptying(name: str, options: GroupPenalty, network: nn.Module, sample: Tensor) -> float:
    """Twice the threshold of one proximal step that would halve the penalty."""
    with torch.enable_grad():
        active = options.attach(network, sample)
    if not isinstance(active, ActiveGroups):
        raise UserError(f"penalties.{name}.relative: it is no penalty on groups of weights")
    if active.targets == 0:
        raise UserError(f"penalties.{name}: {options.nothing_to_do}; leave it out")
    kept = [parameter.detach().clone() for parameter in network.parameters()]

    def left(threshold: float) -> float:
        """The penalty after one step with that threshold."""
        for layer, group in active.groups.items():
            own = threshold * active.factor(layer)
            active.shrink(group, torch.as_tensor(own, device=sample.device))
        value = _value(active)
        for parameter, before in zip(network.parameters(), kept, strict=True):
            parameter.copy_(before)
        return value

    whole = _value(active)
    active.close()
    if whole == 0:
        raise UserError(
            f"penalties.{name}.relative: the penalty is 0 when the training begins, so that it has "
            "no size to be relative to; leave relative out"
        )
    low, high = 0.0, 1.0
    while left(high) > whole / 2:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if left(middle) > whole / 2:
            low = middle
        else:
            high = middle
    return 2 * high


def _value(active: "ActiveGroups[object]") -> float:
    """The penalty of all groups, each with strength 1 times its factor."""
    return sum(
        active.factor(name) * float(active.norm(group)) for name, group in active.groups.items()
    )
