"""Whole layers and blocks that can be taken out of a network, though they are not zero.

Three kinds: a residual branch, whose shortcut is left; a layer between activations that keeps the
shape, whose input is passed on; and an activation between two layers that then merge into one. What
the network computes changes, by how much is for the caller to judge: `Without` runs a network
without one of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.blocks import Shapes
from slimfront.trainables.compaction.layers import (
    bypass,
    is_denser,
    is_larger,
    set_module,
    with_weights,
)
from slimfront.trainables.compaction.merge import product
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.graph import (
    Layer,
    WeightLayer,
    call_counts,
    calls,
    layers_of,
    note_ranks,
    only_user,
    weight_layer,
)
from slimfront.trainables.structure.targets.branches import residual_branches

_ACTIVATIONS: tuple[object, ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardsigmoid),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.celu),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
    *(F.hardtanh, F.tanh, F.sigmoid, F.softplus, F.softsign, F.hardsigmoid),
    *("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_"),
)
_PASSED: tuple[object, ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, F.dropout, torch.flatten),
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d, "flatten"),
    *("view", "reshape", "mean"),
)
"""What may lie between an activation and the layer that reads it."""
_UNCHANGED: tuple[object, ...] = (nn.Identity, nn.Dropout)
"""What merging sees through."""


@dataclass(frozen=True)
class WholeLayer:
    """Something that can be taken out; `name` is that of its last weight layer."""

    name: str
    what: str
    """What goes, in words that follow the name."""
    passes: Mapping[fx.Node, fx.Node]
    """What each node gives instead, one of its own inputs; in order of execution."""
    merges: tuple[Layer, str] | None = None
    """The layer that becomes part of another one, and the name of that."""


def whole_layers(graph: fx.GraphModule, inputs: Tensor) -> list[WholeLayer]:
    """All that can be taken out of a traced network as it is, in order of execution.

    Attention is taken apart into linear layers, in place, and activations do not work in place any
    more: what they would overwrite may be passed on.

    Args:
        graph: in evaluation mode.
        inputs: (N, *input_shape), real inputs, by which shapes are known.

    Raises:
        UserError: if its attention cannot be taken apart.
    """
    split_attention(graph)
    for module in graph.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    graph.recompile()
    note_ranks(graph, inputs)
    shapes = Shapes(graph).of(inputs)
    found = [
        *_branches(graph, shapes),
        *_inner(graph, shapes),
        *_merging(graph),
    ]
    places = {node: place for place, node in enumerate(graph.graph.nodes)}

    def first_place(layer: WholeLayer) -> int:
        return min(places[node] for node in layer.passes)

    return sorted(found, key=first_place)


def take_out(graph: fx.GraphModule, layer: WholeLayer) -> None:
    """Takes it out, in place; layers that merge are one afterwards."""
    passes = list(layer.passes.items())
    for node, source in reversed(passes):
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    if layer.merges is not None:
        first, name = layer.merges
        following = graph.get_submodule(name)
        combined = _combined(first, following)
        assert combined is not None
        set_module(graph, name, combined)
        if first.last is not first.node:
            bypass(graph, first.last)
        bypass(graph, first.node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def is_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an activation that works on each number alone."""
    return calls(graph, node, _ACTIVATIONS)


class Without(fx.Interpreter):
    """Runs a network as if something was taken out, and leaves it as it is."""

    def __init__(self, graph: fx.GraphModule, layer: WholeLayer) -> None:
        super().__init__(graph)
        self.passes = layer.passes

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation, or passes its input on."""
        if n in self.passes:
            return self.env[self.passes[n]]
        return super().run_node(n)


Made = Mapping[fx.Node, object]
"""Shape and type of what each node makes."""


def _branches(graph: fx.GraphModule, shapes: Made) -> Iterator[WholeLayer]:
    for branch in residual_branches(graph):
        if shapes[branch.shortcut] != shapes[branch.addition]:
            continue
        yield WholeLayer(
            name=branch.name,
            what="the residual branch that ends in it",
            passes={branch.addition: branch.shortcut},
        )


def _inner(graph: fx.GraphModule, shapes: Made) -> Iterator[WholeLayer]:
    """Layers between activations that keep the shape."""
    for layer in layers_of(graph):
        activation = _activation_behind(graph, layer)
        if activation is None:
            continue
        source = layer.node.args[0]
        if not isinstance(source, fx.Node):
            continue
        if not _is_activated(graph, source):
            continue
        if shapes[source] != shapes[layer.last]:
            continue
        passes = {layer.node: source}
        if layer.last is not layer.node:
            passes[layer.last] = layer.node
        passes[activation] = layer.last
        yield WholeLayer(
            name=layer.name,
            what="the layer and its activation",
            passes=passes,
        )


def _activation_behind(graph: fx.GraphModule, layer: Layer) -> fx.Node | None:
    """The activation that alone reads what a layer gives; None if there is none."""
    reader = only_user(layer.last)
    if reader is None:
        return None
    if not is_activation(graph, reader):
        return None
    return reader


def _is_activated(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is what an activation gave, or pools and the like of that."""
    while calls(graph, node, _PASSED):
        node = node.all_input_nodes[0]
    return is_activation(graph, node)


def _merging(graph: fx.GraphModule) -> Iterator[WholeLayer]:
    """Layers that become part of the next one where the activation between them goes."""
    counts = call_counts(graph)
    for layer in layers_of(graph):
        activation = _activation_behind(graph, layer)
        if activation is None:
            continue
        after = only_user(activation)
        while calls(graph, after, _UNCHANGED):
            assert after is not None
            after = only_user(after)
        following = weight_layer(graph, after)
        if after is None or following is None:
            continue
        if counts[after.target] > 1:
            continue
        if _combined(layer, following) is None:
            continue
        name = str(after.target)
        yield WholeLayer(
            name=layer.name,
            what=f"its activation, so that it merges into '{name}'",
            passes={activation: layer.last},
            merges=(layer, name),
        )


@torch.no_grad()
def _combined(layer: Layer, following: nn.Module) -> WeightLayer | None:
    """A layer and the one that reads it as one; None where that is not exact, or has more weights
    than they have."""
    assert isinstance(following, WeightLayer)
    bias: Tensor | None
    weight, bias = layer.folded()
    if layer.norm is None and layer.layer.bias is None:
        bias = None
    first = with_weights(layer.layer, weight, bias)
    combined = product(first, following)
    if combined is None:
        return None
    if is_larger(combined, first, following):
        return None
    if is_denser(combined, first, following):
        return None
    return combined
