"""Changing the layers of a traced network."""

import copy

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.structure.graph import (
    Conv,
    Layer,
    WeightLayer,
    layers_of,
    rounding,
)
from slimfront.trainables.structure.signs import nonnegative_nodes


class _Undrawn:
    """Mixed into layers: leaves the weights as they are, since to draw them takes longer than all
    else, even without memory."""

    def reset_parameters(self) -> None:
        """Does nothing."""


class _Linear(_Undrawn, nn.Linear): ...


class _Conv1d(_Undrawn, nn.Conv1d): ...


class _Conv2d(_Undrawn, nn.Conv2d): ...


class _Conv3d(_Undrawn, nn.Conv3d): ...


_CONVS: dict[type[Conv], type[Conv]] = {nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


def with_weights(like: WeightLayer, weight: Tensor, bias: Tensor | None) -> WeightLayer:
    """A layer of the kind, type and device of `like`, with its stride and padding, of `weight`
    (out, in, …) and `bias` (out)."""
    outputs, inputs = weight.shape[:2]
    layer: WeightLayer
    kind: type[nn.Module]
    if isinstance(like, nn.Linear):
        kind, layer = nn.Linear, _Linear(inputs, outputs, bias=bias is not None, device="meta")
    else:
        kind = next(each for each in _CONVS if isinstance(like, each))
        layer = _CONVS[kind](
            inputs,
            outputs,
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            stride=like.stride,  # type: ignore[arg-type]
            padding=like.padding,  # type: ignore[arg-type]
            dilation=like.dilation,  # type: ignore[arg-type]
            bias=bias is not None,
            padding_mode=like.padding_mode,
            device="meta",
        )
    layer.__class__ = kind  # type: ignore[assignment]
    layer.weight = nn.Parameter(weight.detach().to(like.weight))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(like.weight))
    return layer.eval()


def set_module(graph: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(graph.get_submodule(parent), leaf, module)


def bypass(graph: fx.GraphModule, node: fx.Node) -> None:
    """Takes out a node that passes its first input on unchanged."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def count_nonzeros(layer: nn.Module) -> int:
    """How many entries of a layer's parameters are not zero."""
    return sum(int(p.count_nonzero()) for p in layer.parameters())


@torch.no_grad()
def fold_batch_norms(graph: fx.GraphModule) -> list[str]:
    """Folds every batch norm that follows a layer into it, in float64; returns the names of the
    layers."""
    folded = []
    for layer in layers_of(graph):
        if layer.norm is None:
            continue
        weight, bias = _in_float64(layer).folded()
        set_module(graph, layer.name, with_weights(layer.layer, weight, bias))
        bypass(graph, layer.last)
        folded.append(layer.name)
    return folded


@torch.no_grad()
def clear_rounding(graph: fx.GraphModule, folded: list[str], dtype: torch.dtype) -> None:
    """Sets to zero what folding left negative where training had made a zero; `dtype` is that of
    training.
    """
    for name in folded:
        layer = graph.get_submodule(name)
        assert isinstance(layer, WeightLayer) and layer.bias is not None
        error = rounding(layer.weight, layer.bias, dtype)
        for tensor in (layer.weight, layer.bias):
            tensor.masked_fill_((tensor < 0) & (tensor >= -error), 0)


def _in_float64(layer: Layer) -> Layer:
    norm = copy.deepcopy(layer.norm).double() if layer.norm is not None else None
    return Layer(layer.name, copy.deepcopy(layer.layer).double(), norm, layer.node, layer.last)


def nonnegative_when_trained(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose output is non-negative with the present weights (batch norms folded)."""
    inactive = {
        layer.node for layer in layers_of(graph) if layer.norm is None and not layer.active()
    }
    return nonnegative_nodes(graph, lambda node: node in inactive)
