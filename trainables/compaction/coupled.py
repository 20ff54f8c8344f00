"""Dead channels that several layers share: removed from all of them, where residual additions and
the like couple them."""

import logging
from collections.abc import Callable

from torch import Tensor, fx, nn

from slimfront.trainables.compaction.agreement import EXACT, Probe
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.channel_groups import channel_groups, remove_units
from slimfront.trainables.structure.graph import WeightLayer, copied

log = logging.getLogger(__name__)


def remove_coupled_channels(
    network: fx.GraphModule, inputs: Tensor, probe: Probe, tolerance: float = EXACT
) -> list[Removed]:
    """Removes the channels that are 0 in every layer that writes them, in place; each group keeps
    at least one unit.

    A group is left as it is where the outputs would not be those of `probe` any more (to
    `tolerance`): what lies between the layers does not pass zeros on, or the network has a size
    written into its code. `inputs` (N, *input_shape) show what couples.
    """
    if not any(
        _has_dead_row(layer) for layer in network.modules() if isinstance(layer, WeightLayer)
    ):
        return []
    network.recompile()  # its graph may have changed
    try:
        groups = channel_groups(network, inputs)
    except UserError as error:
        log.warning("channels shared by several layers stay: %s", error)
        return []
    parameters = dict(network.named_parameters())
    dead: dict[str, Tensor] = {}
    for group in groups:
        gone = ~group.alive(parameters)
        gone[0] &= not bool(gone.all())
        if gone.any():
            dead[group.name] = gone
    right = _rightly_removed(
        list(dead),
        lambda names: _without(
            network, inputs, {name: dead[name] for name in names}, probe, tolerance
        ),
    )
    if right:
        remove_units(network, inputs, {name: dead[name] for name in right})
    return [Removed(name, int(dead[name].sum()), whole=False) for name in right]


def _rightly_removed(names: list[str], right: Callable[[list[str]], bool]) -> list[str]:
    """Those groups that can go together, found by halving: most are right, so that few networks are
    looked at."""
    if not names or right(names):
        return names
    if len(names) == 1:
        return []
    middle = len(names) // 2
    first, second = _rightly_removed(names[:middle], right), _rightly_removed(names[middle:], right)
    return (
        first + second
        if not (first and second) or right(first + second)
        else max(first, second, key=len)
    )


def _has_dead_row(layer: WeightLayer) -> bool:
    rows = layer.weight.detach().flatten(1).any(1)
    if layer.bias is not None:
        rows |= layer.bias.detach() != 0
    return not bool(rows.all())


def _without(
    network: nn.Module, inputs: Tensor, dead: dict[str, Tensor], probe: Probe, tolerance: float
) -> bool:
    """Whether the outputs stay without those units."""
    smaller = copied(network)
    try:
        remove_units(smaller, inputs, dead)
    except (RuntimeError, IndexError):  # a shape that does not fit any more
        return False
    return probe.agrees(smaller, tolerance)
