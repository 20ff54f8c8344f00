"""Dead units that several layers share: removed from all of them, where residual additions, heads
and the like couple them."""

import logging
import math
from collections.abc import Callable

from torch import Tensor, fx, nn

from slimfront.trainables.compaction.slicing import sliced
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.agreement import EXACT, Probe
from slimfront.trainables.structure.channel_groups import ChannelGroup, channel_groups, remove_units
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import WeightLayer, module_of
from slimfront.trainables.structure.removable import removable_together

log = logging.getLogger(__name__)

_BY_COLUMNS = (nn.Embedding, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def remove_coupled_channels(
    network: fx.GraphModule,
    inputs: Tensor,
    tolerance: float = EXACT,
    probe: Probe | None = None,
    multiple: int = 1,
) -> list[Removed]:
    """Removes the units that every reader of theirs reads as 0, or with weights of 0, in place;
    each layer keeps at least one.

    Units stay where the outputs could change by more than `tolerance`, or where the network has a
    size written into its code that cannot be changed. `inputs` (N, *input_shape) show what couples;
    `probe` knows what the network should compute, if that was found out before. As many more stay
    as make the numbers of those that stay a `multiple`, if there are so many.
    """
    if not _has_zeros(network):
        return []
    network.recompile()  # its graph may have changed
    own = sliced(network, inputs, _agreement(network, inputs, tolerance, probe), multiple)
    if own is not None:
        return [Removed(name, count, whole=False) for name, count in own.items()]
    return _removed_by_dependencies(network, inputs, tolerance, multiple)


def _agreement(
    network: fx.GraphModule, inputs: Tensor, tolerance: float, probe: Probe | None
) -> Callable[[nn.Module], bool]:
    """Whether another network computes what this one does, which is run when that is asked, and if
    no probe knows it."""

    def agrees(other: nn.Module) -> bool:
        if probe is not None:
            return probe.agrees(other, tolerance, briefly=True)
        return Probe(network, inputs).agrees(other, tolerance)

    return agrees


def _has_zeros(network: fx.GraphModule) -> bool:
    """Whether a weight is 0 all along a row, or along a column that reads what a layer made."""
    first = _first_layers(network)
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            continue
        entries = parameter.detach().flatten(2) if parameter.dim() > 2 else parameter.unsqueeze(2)
        nonzero = entries.any(2)
        if not nonzero.any(1).all():
            return True
        if name.rpartition(".")[0] not in first and not nonzero.any(0).all():
            return True
    return False


def _first_layers(network: fx.GraphModule) -> set[str]:
    """The layers that read the network's inputs, and what no layer made of them, but for those
    whose columns are what they make."""
    made: set[fx.Node] = set()
    first = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        reads = any(source in made for source in node.all_input_nodes)
        if module is not None and not reads and not isinstance(module, _BY_COLUMNS):
            first.add(str(node.target))
        has_weights = module is not None and next(module.parameters(), None) is not None
        if reads or has_weights or node.op == "get_attr":
            made.add(node)
    return first


def _removed_by_dependencies(
    network: fx.GraphModule, inputs: Tensor, tolerance: float, multiple: int
) -> list[Removed]:
    """The same by Torch-Pruning's graph, for what ours does not follow."""
    if not dead_units(network):
        return []
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
        gone &= ~put_back(gone, _units_at_once(group, multiple))
        if gone.any():
            dead[group.name] = gone
    right = removable_together(network, inputs, dead, tolerance)
    if right:
        remove_units(network, inputs, {name: dead[name] for name in right})
    return [Removed(name, int(dead[name].sum()), whole=False) for name in right]


def _units_at_once(group: ChannelGroup, multiple: int) -> int:
    """Of how many units a multiple has to stay, so that a `multiple` of the rows of each layer that
    makes them does: a unit may be several rows there."""
    at_once = 1
    for owners in group.writers.values():
        rows = int((owners >= 0).sum()) // group.units
        at_once = math.lcm(at_once, multiple // math.gcd(multiple, rows))
    return at_once


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
