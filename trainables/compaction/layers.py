"""Changing the layers of a traced network."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

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
    kind, layer = _undrawn(like, weight, has_bias=bias is not None)
    layer.__class__ = kind  # type: ignore[assignment]
    layer.weight = _parameter_like(like, weight)
    if bias is not None:
        layer.bias = _parameter_like(like, bias)
    return layer.eval()


def _undrawn(
    like: WeightLayer, weight: Tensor, *, has_bias: bool
) -> tuple[type[nn.Module], WeightLayer]:
    """The kind of a layer, and one of its settings and of the sizes of `weight`, without memory."""
    outputs, inputs, *kernel = weight.shape
    if isinstance(like, nn.Linear):
        linear = _Linear(
            inputs,
            outputs,
            bias=has_bias,
            device="meta",
        )
        return nn.Linear, linear
    kind = next(each for each in _CONVS if isinstance(like, each))
    convolution = _CONVS[kind](
        inputs,
        outputs,
        tuple(kernel),  # type: ignore[arg-type]
        stride=like.stride,  # type: ignore[arg-type]
        padding=like.padding,  # type: ignore[arg-type]
        dilation=like.dilation,  # type: ignore[arg-type]
        bias=has_bias,
        padding_mode=like.padding_mode,
        device="meta",
    )
    return kind, convolution


def _parameter_like(like: WeightLayer, values: Tensor) -> nn.Parameter:
    """A parameter of the type and device of a layer."""
    values = values.detach()
    return nn.Parameter(values.to(like.weight))


def set_module(graph: GraphModule, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    owner, leaf = _owner(graph, name)
    setattr(owner, leaf, module)


def _owner(network: GraphModule, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this name, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    owner = network.get_submodule(path)
    return owner, leaf


def set_called(graph: GraphModule, node: Node, module: nn.Module) -> None:
    """Puts `module` in the place of the module that a node calls."""
    set_module(graph, str(node.target), module)


def set_tensor(network: GraphModule, name: str, tensor: Tensor) -> None:
    """Puts a parameter or buffer in the place of the one of that name."""
    owner, leaf = _owner(network, name)
    setattr(owner, leaf, tensor)


def delete_tensor(network: GraphModule, name: str) -> None:
    """Takes the parameter or buffer of that name away."""
    owner, leaf = _owner(network, name)
    delattr(owner, leaf)


def bypass(graph: GraphModule, node: Node) -> None:
    """Takes out a node that passes its first input on unchanged."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def count_nonzeros(layer: nn.Module) -> int:
    """How many entries of a layer's parameters are not zero."""
    count = 0
    for parameter in layer.parameters():
        count += int(parameter.count_nonzero())
    return count


def count_weights(layer: nn.Module) -> int:
    """How many entries a layer's parameters have."""
    count = 0
    for parameter in layer.parameters():
        count += parameter.numel()
    return count


def is_denser(combined: nn.Module, first: nn.Module, second: nn.Module) -> bool:
    """Whether a layer has more weights that are not zero than two others together."""
    apart = count_nonzeros(first) + count_nonzeros(second)
    return count_nonzeros(combined) > apart


@torch.no_grad()
def fold_batch_norms(graph: GraphModule) -> list[str]:
    """Folds every batch norm that follows a layer into it, in float64; returns the names of the
    layers."""
    folded = []
    for layer in layers_of(graph):
        if layer.norm is None:
            continue
        exact = _in_float64(layer)
        weight, bias = exact.folded()
        folded_layer = with_weights(layer.layer, weight, bias)
        set_module(graph, layer.name, folded_layer)
        bypass(graph, layer.last)
        folded.append(layer.name)
    return folded


@torch.no_grad()
def clear_rounding(graph: GraphModule, folded: list[str], dtype: torch.dtype) -> None:
    """Sets to zero what folding left negative where training had made a zero; `dtype` is that of
    training.
    """
    for name in folded:
        layer = graph.get_submodule(name)
        assert isinstance(layer, WeightLayer)
        weight = layer.weight
        bias = layer.bias
        assert bias is not None
        error = rounding(weight, bias, dtype)
        for tensor in (weight, bias):
            is_negative = tensor < 0
            is_small = tensor >= -error
            is_rounding = is_negative & is_small
            tensor.masked_fill_(is_rounding, 0)


def _in_float64(layer: Layer) -> Layer:
    norm = layer.norm
    if norm is not None:
        norm = copy.deepcopy(norm).double()
    return replace(
        layer,
        layer=copy.deepcopy(layer.layer).double(),
        norm=norm,
    )


def nonnegative_when_trained(graph: GraphModule) -> set[Node]:
    """Nodes whose output is non-negative with the present weights (batch norms folded)."""
    inactive = set()
    for layer in layers_of(graph):
        if layer.norm is not None:
            continue
        if not layer.active():
            inactive.add(layer.node)

    def is_inactive(node: Node) -> bool:
        return node in inactive

    return nonnegative_nodes(graph, is_inactive)
