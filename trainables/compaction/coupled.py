"""Dead units that several layers share: removed from all of them, where residual additions, heads
and the like couple them."""

import logging
import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.slicing import sliced
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.agreement import EXACT, Probe
from slimfront.trainables.structure.channel_groups import ChannelGroup, channel_groups, remove_units
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import WeightLayer, module_of
from slimfront.trainables.structure.removable import removable_together

log = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (WeightLayer, *_TRANSPOSED)
_BY_COLUMNS = (nn.Embedding, nn.EmbeddingBag, *_TRANSPOSED)


def remove_coupled_channels(
    network: GraphModule,
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
    if not has_zeros(network):
        return []
    network.recompile()  # its graph may have changed
    agrees = _agreement(network, inputs, tolerance, probe)
    lost = sliced(network, inputs, agrees, multiple)
    if lost is None:
        return _removed_by_dependencies(network, inputs, tolerance, multiple)
    return _in_part(lost)


def _in_part(counts: dict[str, int]) -> list[Removed]:
    """How many units layers lost, by name, which all keep some."""
    found = []
    for name, count in counts.items():
        found.append(Removed(name, count, whole=False))
    return found


def _agreement(
    network: GraphModule, inputs: Tensor, tolerance: float, probe: Probe | None
) -> Callable[[nn.Module], bool]:
    """Whether another network computes what this one does, which is run when that is asked, and if
    no probe knows it."""

    def agrees(other: nn.Module) -> bool:
        if probe is not None:
            return probe.agrees(other, tolerance, briefly=True)
        return Probe(network, inputs).agrees(other, tolerance)

    return agrees


def has_zeros(network: GraphModule) -> bool:
    """Whether a weight is 0 all along a row, or along a column that reads what a layer made."""
    first = _first_layers(network)
    for name, parameter in network.named_parameters():
        axes = parameter.dim()
        if axes < 2:
            continue
        weight = parameter.detach()
        entries = weight.flatten(2) if axes > 2 else weight.unsqueeze(2)
        nonzero = entries.any(2)
        row_is_fed = nonzero.any(1)
        if not row_is_fed.all():
            return True
        owner, _, _ = name.rpartition(".")
        if owner in first:
            continue
        column_is_read = nonzero.any(0)
        if not column_is_read.all():
            return True
    return False


def _first_layers(network: GraphModule) -> set[str]:
    """The layers that read the network's inputs, and what no layer made of them, but for those
    whose columns are what they make."""
    made: set[Node] = set()
    """What layers made, or hold."""
    first = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        reads_made = any(source in made for source in node.all_input_nodes)
        if module is None:
            if reads_made or node.op == "get_attr":
                made.add(node)
            continue
        if not reads_made and not isinstance(module, _BY_COLUMNS):
            first.add(str(node.target))
        has_weights = next(module.parameters(), None) is not None
        if reads_made or has_weights:
            made.add(node)
    return first


def _removed_by_dependencies(
    network: GraphModule, inputs: Tensor, tolerance: float, multiple: int
) -> list[Removed]:
    """The same by Torch-Pruning's graph, for what ours does not follow."""
    if not dead_units(network):
        return []
    try:
        groups = channel_groups(network, inputs)
    except UserError as error:
        log.warning("channels shared by several layers stay: %s", error)
        return []
    dead = _dead_of_groups(network, groups, multiple)
    right = removable_together(network, inputs, dead, tolerance)
    gone = {name: dead[name] for name in right}
    if gone:
        remove_units(network, inputs, gone)
    counts = {}
    for name, units in gone.items():
        counts[name] = int(units.sum())
    return _in_part(counts)


def _dead_of_groups(
    network: GraphModule, groups: list[ChannelGroup], multiple: int
) -> dict[str, Tensor]:
    """Which units of each group can go, (units,) bool, by its name; one of each stays, and what
    makes a multiple."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    dead: dict[str, Tensor] = {}
    for group in groups:
        gone = ~group.alive(parameters)
        if gone.all():
            gone[0] = False
        units_at_once = _units_at_once(group, multiple)
        gone &= ~put_back(gone, units_at_once)
        if gone.any():
            dead[group.name] = gone
    return dead


def _units_at_once(group: ChannelGroup, multiple: int) -> int:
    """Of how many units a multiple has to stay, so that a `multiple` of the rows of each layer that
    makes them does: a unit may be several rows there."""
    at_once = 1
    for owners in group.writers.values():
        rows = int((owners >= 0).sum())
        rows_of_unit = rows // group.units
        needed = multiple // math.gcd(multiple, rows_of_unit)
        at_once = math.lcm(at_once, needed)
    return at_once


def dead_units(network: nn.Module) -> dict[str, int]:
    """How many units of each linear and convolutional layer have no weight and no bias, by the
    layer's name."""
    found: dict[str, int] = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        dead = ~_alive(layer)
        count = int(dead.sum())
        if count:
            found[name] = count
    return found


def _alive(layer: nn.Module) -> Tensor:
    """Which units have a weight or a bias that is not 0: (units,)."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, …), the inputs by group
        by_group = weight.unflatten(0, (layer.groups, -1))
        weight = by_group.transpose(1, 2).flatten(0, 1)
    weights_of_units = weight.flatten(1)
    alive = weights_of_units.any(1)
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if bias is None:
        return alive
    has_bias = bias.detach() != 0
    return alive | has_bias
