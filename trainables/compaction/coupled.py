"""Dead channels that several layers share: removed from all of them, where residual additions and
the like couple them."""

import logging

from torch import Tensor, fx, nn

from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.agreement import EXACT
from slimfront.trainables.structure.channel_groups import channel_groups, remove_units
from slimfront.trainables.structure.graph import WeightLayer
from slimfront.trainables.structure.removable import removable_together

log = logging.getLogger(__name__)


def remove_coupled_channels(
    network: fx.GraphModule, inputs: Tensor, tolerance: float = EXACT
) -> list[Removed]:
    """Removes the channels that are 0 in every layer that writes them, in place; each group keeps
    at least one unit.

    A group is left as it is where the outputs could change by more than `tolerance`: what lies
    between the layers does not pass zeros on, or the network has a size written into its code.
    `inputs` (N, *input_shape) show what couples.
    """
    if not dead_units(network):
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
    right = removable_together(network, inputs, dead, tolerance)
    if right:
        remove_units(network, inputs, {name: dead[name] for name in right})
    return [Removed(name, int(dead[name].sum()), whole=False) for name in right]


def dead_units(network: nn.Module) -> dict[str, int]:
    """How many units of each linear and convolutional layer have no weight and no bias, by the
    layer's name."""
    found: dict[str, int] = {}
    for name, layer in network.named_modules():
        if isinstance(
            layer, WeightLayer | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
        ):
            count = int((~_alive(layer)).sum())
            found |= {name: count} if count else {}
    return found


def _alive(layer: nn.Module) -> Tensor:
    """Which units have a weight or a bias that is not 0: (units,)."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if not isinstance(layer, WeightLayer):  # transposed: (in, out / groups, …), the inputs by group
        groups: int = layer.groups  # type: ignore[assignment]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    alive = weight.flatten(1).any(1)
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return alive if bias is None else alive | (bias.detach() != 0)
