"""Batch norms without factors behind channels that are always 0.

While a network is trained, such a channel is 0 behind the norm too: less the mean of the batch,
which is 0. In evaluation mode it is less the running mean, which only tends to 0, so that it would
be another constant, and stay.
"""

import torch
from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import BatchNorm, call_counts, module_of, weight_layer
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating


@torch.no_grad()
def stilled(network: nn.Module, inputs: torch.Tensor | Several) -> nn.Module:
    """The network with running means of 0 where channels are always 0: a copy, or itself where
    there are none such, or it cannot be traced.

    Args:
        inputs: (N, *input_shape), by which it is traced.
    """
    if not any(map(_has_no_factors, network.modules())):
        return network
    try:
        with evaluating(network):
            graph = trace(network, inputs[:3])
    except UserError:
        return network  # whoever makes it compact says so
    still = _still_channels(graph)
    if not still:
        return network
    made = copied(network)
    for name, channels in still.items():
        mean = made.get_buffer(f"{name}.running_mean")
        mean[channels] = 0
    return made


def _has_no_factors(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and not module.affine and module.running_mean is not None


def _still_channels(graph: GraphModule) -> dict[str, torch.Tensor]:
    """By the name of each such norm behind a layer that is called once: which channels that layer
    gives no weight and no bias, if their mean is not 0."""
    counts = call_counts(graph)
    found = {}
    for node in graph.graph.nodes:
        norm = module_of(graph, node)
        if norm is None or not _has_no_factors(norm):
            continue
        source = node.args[0]
        layer = weight_layer(graph, source, grouped=True)
        if layer is None or counts[node.target] > 1 or counts[source.target] > 1:
            continue
        dead = ~layer.weight.flatten(1).any(1)
        if layer.bias is not None:
            dead &= layer.bias == 0
        mean: torch.Tensor = norm.running_mean  # type: ignore[assignment]
        if len(dead) == len(mean) and bool(mean[dead].any()):
            found[str(node.target)] = dead
    return found
