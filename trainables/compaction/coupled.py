"""Dead channels that several layers share: removed from all of them, where residual additions and the like couple them."""

import logging

import torch
from torch import Tensor, fx, nn

from trainables.channels import channel_groups, remove_units
from trainables.compaction.units import Removed
from trainables.errors import UserError
from trainables.graph import WeightLayer, copied

log = logging.getLogger(__name__)


def remove_coupled_channels(network: fx.GraphModule, inputs: Tensor, tolerance: float) -> list[Removed]:
    """Removes the channels that are 0 in every layer that writes them, in place; each group keeps at least one unit.

    A group is left as it is where the outputs on `inputs` (N, *input_shape) would change by more than `tolerance`, relative to
    the largest: what lies between the layers does not pass zeros on, or the network has a size written into its code.
    """
    if not any(_has_dead_row(layer) for layer in network.modules() if isinstance(layer, WeightLayer)):
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
    if dead and not _keeps_outputs(network, inputs, dead, tolerance):
        dead = {name: gone for name, gone in dead.items() if _keeps_outputs(network, inputs, {name: gone}, tolerance)}
        if not _keeps_outputs(network, inputs, dead, tolerance):
            return []
    if dead:
        remove_units(network, inputs, dead)
    return [Removed(name, int(gone.sum()), whole=False) for name, gone in dead.items()]


def _has_dead_row(layer: WeightLayer) -> bool:
    rows = layer.weight.detach().flatten(1).any(1)
    if layer.bias is not None:
        rows |= layer.bias.detach() != 0
    return not bool(rows.all())


def _keeps_outputs(network: nn.Module, inputs: Tensor, dead: dict[str, Tensor], tolerance: float) -> bool:
    smaller = copied(network)
    try:
        remove_units(smaller, inputs, dead)
        with torch.no_grad():
            wanted, got = network(inputs), smaller(inputs)
    except RuntimeError:  # a shape that does not fit any more
        return False
    return wanted.shape == got.shape and bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())
