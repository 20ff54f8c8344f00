"""Batch norms behind convolutions that removal does not fold: those of several groups, depthwise
ones among them, and transposed ones; and norms without factors."""

import copy

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.layers import bypass, set_called
from slimfront.trainables.structure.graph import (
    BatchNorm,
    Conv,
    batch_norm,
    call_counts,
    module_of,
    rows,
)

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_AXES_OF: dict[type[nn.Module], int] = {
    **{nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3},
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3},
    **{nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3},
}


@torch.no_grad()
def fold_remaining_norms(graph: fx.GraphModule) -> list[str]:
    """Folds each into the convolution in front of it, which must feed nothing else, in float64;
    returns the names of the convolutions."""
    counts = call_counts(graph)
    folded = []
    for node in list(graph.graph.nodes):
        norm = batch_norm(graph, node)
        if norm is None or counts[node.target] > 1:
            continue
        source = node.args[0]
        layer = module_of(graph, source)
        if not isinstance(layer, Conv | _Transposed) or not _are_of_one_rank(layer, norm):
            continue
        if counts[source.target] > 1 or len(source.users) > 1:
            continue
        set_called(graph, source, _with_norm(layer, norm))
        bypass(graph, node)
        folded.append(str(source.target))
    return folded


def _are_of_one_rank(layer: Conv | _Transposed, norm: BatchNorm) -> bool:
    ranks = []
    for module in (layer, norm):
        ranks += [axes for kind, axes in _AXES_OF.items() if isinstance(module, kind)]
    return len(ranks) == 2 and ranks[0] == ranks[1]


def _with_norm(layer: Conv | _Transposed, norm: BatchNorm) -> nn.Module:
    """The layer whose outputs are those of the norm behind it."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(_scaled(layer, scale).to(layer.weight))
    made.bias = nn.Parameter(shift.to(layer.weight))
    return made.eval()


def _scaled(layer: Conv | _Transposed, scale: Tensor) -> Tensor:
    """Its weight, with each output multiplied by an entry of `scale` (out)."""
    weight = layer.weight.double()
    if isinstance(layer, Conv):
        return weight * rows(scale, weight)
    # (in, out / groups, …): the inputs of a group see the outputs of that group alone.
    of_inputs = scale.view(layer.groups, -1).repeat_interleave(
        layer.in_channels // layer.groups, dim=0
    )
    others = [1] * (weight.dim() - 2)
    return weight * of_inputs.view(*of_inputs.shape, *others)
