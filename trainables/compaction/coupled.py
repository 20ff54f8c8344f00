"""Dead channels that several layers share: removed from all of them, where residual additions and
the like couple them."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.agreement import EXACT, Probe
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.errors import UserError
from slimfront.trainables.precision import all_of_float32
from slimfront.trainables.structure.channel_groups import ChannelGroup, channel_groups, remove_units
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
    right = _rightly_removed(
        list(dead),
        lambda names: _without(
            network, inputs, {name: dead[name] for name in names}, probe, tolerance
        ),
    )
    if right:
        remove_units(network, inputs, {name: dead[name] for name in right})
    return [Removed(name, int(dead[name].sum()), whole=False) for name in right]


def removable_groups(network: nn.Module, inputs: Tensor) -> list[ChannelGroup]:
    """The groups of `channel_groups` of which a unit that is zero can be removed, which is tried on
    a copy.

    Torch-Pruning takes what it does not know for operations that act on each channel alone. Others,
    such as a norm of another axis, a softmax or a mean over channels, or a size in the code, only
    show then.

    Raises:
        UserError: if Torch-Pruning cannot analyse the network.
    """
    groups = channel_groups(network, inputs)
    units = {
        group.name: torch.arange(group.units) == group.units - 1
        for group in groups
        if group.units > 1
    }
    if not units:
        return groups
    zeroed = copied(network).eval()
    with torch.no_grad(), all_of_float32():
        _zero(zeroed, groups, units)
        try:
            exact = zeroed.double()
            seen, tolerance = inputs[:_SEEN].double(), EXACT
            probe = Probe(exact, seen, fresh=False)
        except (RuntimeError, TypeError, ValueError):
            exact, seen, tolerance = copied(network).eval(), inputs[:_SEEN], _LOOSE
            _zero(exact, groups, units)
            probe = Probe(exact, seen, fresh=False)
        right = _rightly_removed(
            list(units),
            lambda names: _without(
                exact, seen, {name: units[name] for name in names}, probe, tolerance
            ),
        )
    return [group for group in groups if group.name in right or group.name not in units]


_SEEN = 2
"""So few inputs show whether units can be removed: the weights are random, or as good as."""
_LOOSE = 1e-4
"""How far outputs may be apart where a network cannot be run in float64."""


def _zero(network: nn.Module, groups: list[ChannelGroup], units: dict[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for group in groups:
        for name, owners in group.writers.items() if group.name in units else ():
            rows = units[group.name][owners.clamp(min=0)] & (owners >= 0)
            parameters[name][rows.to(parameters[name].device)] = 0


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
