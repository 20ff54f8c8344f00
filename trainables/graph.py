"""What is known about a network's structure, found by tracing it with torch.fx."""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from trainables.errors import UserError

_RELU_MODULES = (nn.ReLU,)
_RELU_FUNCTIONS = (torch.relu, F.relu)
_RELU_METHODS = ("relu", "relu_")
_SHAPE_MODULES = (nn.Flatten, nn.Identity, nn.Dropout)  # dropout: its outputs are its inputs, zeroed or scaled up
_SHAPE_FUNCTIONS = (torch.flatten, F.dropout)
_SHAPE_METHODS = ("flatten", "view", "reshape", "contiguous")


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a network; it shares the network's modules and parameters.

    Raises:
        UserError: if the network's forward cannot be traced (data-dependent control flow, say).
    """
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__}.forward cannot be traced ({error}); "
            "layer penalties and compaction need a forward without data-dependent control flow"
        ) from error


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None if it does not call one."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node applies a ReLU."""
    return _calls(graph, node, _RELU_MODULES, _RELU_FUNCTIONS, _RELU_METHODS)


def is_shape_only(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node only reshapes its input, or passes it on, so that signs are kept."""
    return _calls(graph, node, _SHAPE_MODULES, _SHAPE_FUNCTIONS, _SHAPE_METHODS)


def is_linear(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls an `nn.Linear`."""
    return isinstance(module_of(graph, node), nn.Linear)


def has_negative_entry(layer: nn.Linear) -> bool:
    """Whether [W | b] has a negative entry, that is, whether the layer is active (arXiv 2006.15604, section 2)."""
    bias_negative = layer.bias is not None and bool((layer.bias < 0).any())
    return bias_negative or bool((layer.weight < 0).any())


def nonnegative_nodes(graph: fx.GraphModule, *, trained: bool = False) -> set[fx.Node]:
    """Nodes whose output is non-negative for every input of the network.

    With `trained`, the present weights count too: a layer without a negative entry keeps its input non-negative.
    Without it, only the structure counts, so the answer holds for any weights.
    """
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        keeps_sign = is_shape_only(graph, node)
        if trained and is_linear(graph, node):
            keeps_sign = not has_negative_entry(graph.get_submodule(node.target))  # type: ignore[arg-type]
        if is_relu(graph, node) or (keeps_sign and source in found):
            found.add(node)
    return found


@dataclass(frozen=True)
class InnerLayer:
    """A layer that layer sparsity can make inactive: non-negative input, and output only into a ReLU."""

    name: str
    layer: nn.Linear
    node: fx.Node
    relu: fx.Node


def inner_layers(graph: fx.GraphModule, *, trained: bool = False) -> list[InnerLayer]:
    """The inner layers of a network, in order of execution. `trained` as in `nonnegative_nodes`."""
    nonnegative = nonnegative_nodes(graph, trained=trained)
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    found = []
    for node in graph.graph.nodes:
        once = calls[node.target] == 1 and len(node.users) == 1  # a layer used twice cannot merge in one place
        if once and is_linear(graph, node) and node.args[0] in nonnegative:
            relu = next(iter(node.users))
            if is_relu(graph, relu):
                layer = graph.get_submodule(node.target)
                found.append(InnerLayer(str(node.target), layer, node, relu))  # type: ignore[arg-type]
    return found


def _calls(
    graph: fx.GraphModule,
    node: fx.Node,
    modules: tuple[type[nn.Module], ...],
    functions: tuple[object, ...],
    methods: tuple[str, ...],
) -> bool:
    if node.op == "call_module":
        return isinstance(module_of(graph, node), modules)
    return (node.op == "call_function" and node.target in functions) or (node.op == "call_method" and node.target in methods)
