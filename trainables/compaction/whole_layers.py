"""Whole layers and blocks that can be taken out of a network, though they are not zero.

Three kinds: a residual branch, whose shortcut is left; a layer between activations that keeps the
shape, whose input is passed on; and the activations of a run of layers that merge into one then.
What the network computes changes, by how much is for the caller to judge: `Without` runs a network
without one of them, but for what moved padding changes at the border of images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.merging.runs import Run, merge_run, move_padding, runs
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.graph import Layer, calls, layers_of, only_user
from slimfront.trainables.structure.targets.activations import is_elementwise
from slimfront.trainables.structure.targets.branches import branches_that_can_go
from slimfront.trainables.structure.tracing.shapes import NodeShapes, shapes_of
from slimfront.trainables.structure.tracing.trace import note_ranks

_PASSED: tuple[object, ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, F.dropout, torch.flatten),
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d, "flatten"),
    *("view", "reshape", "mean"),
)
"""What may lie between an activation and the layer that reads it."""


@dataclass(frozen=True)
class WholeLayer:
    """Something that can be taken out; `name` is that of its last weight layer, or of the first
    of those that merge."""

    name: str
    what: str
    """What goes, in words that follow the name."""
    passes: Mapping[Node, Node]
    """What each node gives instead, one of its own inputs; in order of execution."""
    merges: Run | None = None
    """The layers that become one then."""


def whole_layers(graph: GraphModule, inputs: Tensor) -> list[WholeLayer]:
    """All that can be taken out of a traced network as it is, in order of execution.

    Attention is taken apart into linear layers, in place, and activations do not work in place any
    more: what they would overwrite may be passed on.

    Args:
        graph: in evaluation mode.
        inputs: (N, *input_shape), real inputs, by which shapes are known.

    Raises:
        UserError: if its attention cannot be taken apart.
    """
    make_apart(graph)
    note_ranks(graph, inputs)
    shapes = shapes_of(graph, inputs)
    found = [
        *_branches(graph, shapes),
        *_inner(graph, shapes),
        *_merging(graph, shapes),
    ]
    found = [layer for layer in found if _is_read(layer)]
    places = {node: place for place, node in enumerate(graph.graph.nodes)}

    def first_place(layer: WholeLayer) -> int:
        return min(places[node] for node in layer.passes)

    return sorted(found, key=first_place)


def _is_read(layer: WholeLayer) -> bool:
    """Whether anything outside a layer reads it: the last of a network may be computed for
    nothing."""
    passes = layer.passes
    return any(user not in passes for node in passes for user in node.users)


def make_apart(graph: GraphModule) -> None:
    """Takes attention apart into linear layers, and has activations not work in place, in place.
    Raises UserError if attention cannot be."""
    split_attention(graph)
    for module in graph.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    graph.recompile()


def take_out(graph: GraphModule, layer: WholeLayer, *, merging: bool = True) -> None:
    """Takes it out, in place; layers that merge are one afterwards, if they are to be, and else
    have their padding in front, so that they can be."""
    passes = list(layer.passes.items())
    for node, source in reversed(passes):
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    if layer.merges is not None and merging:
        merge_run(graph, layer.merges)
    elif layer.merges is not None:
        move_padding(layer.merges)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


class Without(fx.Interpreter):
    """Runs a network as if something was taken out, and leaves it as it is."""

    def __init__(self, graph: GraphModule, layer: WholeLayer) -> None:
        super().__init__(graph)
        self.passes = layer.passes

    def run_node(self, n: Node) -> Any:
        """Runs one operation, or passes its input on."""
        if n in self.passes:
            return self.env[self.passes[n]]
        return super().run_node(n)


def _branches(graph: GraphModule, shapes: NodeShapes) -> Iterator[WholeLayer]:
    for branch in branches_that_can_go(graph, shapes):
        yield WholeLayer(
            name=branch.name,
            what="the residual branch that ends in it",
            passes={branch.addition: branch.shortcut},
        )


def _inner(graph: GraphModule, shapes: NodeShapes) -> Iterator[WholeLayer]:
    """Layers between activations that keep the shape."""
    for layer in layers_of(graph):
        activation = _activation_behind(graph, layer)
        if activation is None:
            continue
        source = layer.node.args[0]
        if not isinstance(source, Node):
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


def _activation_behind(graph: GraphModule, layer: Layer) -> Node | None:
    """The activation that alone reads what a layer gives; None if there is none."""
    reader = only_user(layer.last)
    if reader is None:
        return None
    if not is_elementwise(graph, reader):
        return None
    return reader


def _is_activated(graph: GraphModule, node: Node) -> bool:
    """Whether it is what an activation gave, or pools and the like of that."""
    while calls(graph, node, _PASSED):
        node = node.all_input_nodes[0]
    return is_elementwise(graph, node)


def _merging(graph: GraphModule, shapes: NodeShapes) -> Iterator[WholeLayer]:
    """Layers that become one where the activations between them go."""
    for run in runs(graph, shapes, is_elementwise):
        passes = {node: node.all_input_nodes[0] for node in run.activations}
        yield WholeLayer(run.layers[0].name, _told(run), passes, merges=run)


def _told(run: Run) -> str:
    last = f"'{run.last.name}'"
    if len(run.layers) == 2:
        told = f"its activation, so that it merges into {last}"
    else:
        told = f"the activations between it and {last}, so that these become one layer"
    if run.moves_padding:
        told += ", with the padding in front of it"
    return told
