"""Batch norms behind convolutions that removal does not fold: those of several groups, depthwise
ones among them, and transposed ones; and norms without factors."""

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

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
def fold_remaining_norms(graph: GraphModule) -> list[str]:
    """Folds each into the convolution in front of it, which must feed nothing else, in float64;
    returns the names of the convolutions."""
    counts = call_counts(graph)
    folded = []
    for node in list(graph.graph.nodes):
        norm = batch_norm(graph, node)
        if norm is None:
            continue
        source = node.args[0]
        layer = module_of(graph, source)
        if not isinstance(layer, Conv | _Transposed):
            continue
        called_once = counts[node.target] == 1 and counts[source.target] == 1
        if not called_once or len(source.users) > 1:
            continue
        if not _are_of_one_rank(layer, norm):
            continue
        combined = _with_norm(layer, norm)
        set_called(graph, source, combined)
        bypass(graph, node)
        folded.append(str(source.target))
    return folded


def _are_of_one_rank(layer: nn.Module, norm: nn.Module) -> bool:
    if isinstance(norm, nn.SyncBatchNorm):
        return True  # it takes inputs of any rank
    of_layer = _axes_of(layer)
    if of_layer is None:
        return False
    return of_layer == _axes_of(norm)


def _axes_of(module: nn.Module) -> int | None:
    """How many axes its positions have; None if that is not known of its kind."""
    for kind, axes in _AXES_OF.items():
        if isinstance(module, kind):
            return axes
    return None


def _with_norm(layer: Conv | _Transposed, norm: BatchNorm) -> nn.Module:
    """The layer whose outputs are those of the norm behind it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance = norm.running_var.double()
    variance = variance + norm.eps
    scale = variance.rsqrt()
    if norm.weight is not None:
        factor = norm.weight.double()
        scale = scale * factor
    mean = norm.running_mean.double()
    if layer.bias is not None:
        own_bias = layer.bias.double()
        mean = mean - own_bias
    bias = -mean * scale
    if norm.bias is not None:
        shift = norm.bias.double()
        bias = bias + shift
    made = copy.deepcopy(layer)
    made.eval()
    weight = _scaled(layer, scale)
    weight = weight.to(layer.weight)
    bias = bias.to(layer.weight)
    made.weight = nn.Parameter(weight)
    made.bias = nn.Parameter(bias)
    return made


def _scaled(layer: Conv | _Transposed, scale: Tensor) -> Tensor:
    """Its weight, with each output multiplied by an entry of `scale` (out)."""
    weight = layer.weight.double()
    if isinstance(layer, Conv):
        factors = rows(scale, weight)
        return weight * factors
    # (in, out / groups, …): the inputs of a group see the outputs of that group alone.
    of_groups = scale.view(layer.groups, -1)
    inputs_of_group = layer.in_channels // layer.groups
    of_inputs = of_groups.repeat_interleave(inputs_of_group, dim=0)
    kernel_axes = weight.dim() - 2
    kernel = [1] * kernel_axes
    factors = of_inputs.view(*of_inputs.shape, *kernel)
    return weight * factors
