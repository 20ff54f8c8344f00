"""Layer merging: an inactive layer's ReLU does nothing, so the layer becomes part of the next one (arXiv 2006.15604)."""

from typing import Literal

import torch
from torch import Tensor, fx, nn

from trainables.graph import has_negative_entry, inner_layers, is_linear, module_of

MergePolicy = Literal["always", "smaller", "never"]


def drop_inactive_relus(graph: fx.GraphModule) -> list[str]:
    """Takes out the ReLU behind every inactive inner layer; outputs stay equal. Returns the names of those layers."""
    dropped = []
    for inner in inner_layers(graph, trained=True):
        if not has_negative_entry(inner.layer):
            inner.relu.replace_all_uses_with(inner.node)
            graph.graph.erase_node(inner.relu)
            dropped.append(inner.name)
    return dropped


def merge_linears(graph: fx.GraphModule, policy: MergePolicy) -> tuple[list[str], list[str]]:
    """Replaces a linear layer that feeds only another linear layer by their product, as the policy says.

    Args:
        policy: "always"; "smaller", only where the product has at most as many non-zero weights as the two layers (the
            product of sparse matrices is denser than they are); or "never".

    Returns:
        Names of the layers that went into the next one, and of those that could have, but would have cost more.
    """
    merged: list[str] = []
    kept: list[str] = []
    if policy == "never":
        return merged, kept
    for node in list(graph.graph.nodes):
        following = _next_linear(graph, node)
        if following is None:
            continue
        first = graph.get_submodule(str(node.target))
        second = graph.get_submodule(str(following.target))
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)  # _next_linear looked
        product = multiply(first, second)
        if policy == "smaller" and _nonzeros(product) > _nonzeros(first) + _nonzeros(second):
            kept.append(str(node.target))
            continue
        set_module(graph, str(following.target), product)
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
        merged.append(str(node.target))
    return merged, kept


@torch.no_grad()
def multiply(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The layer x ↦ second(first(x)), multiplied in float64: W = W₂W₁ (out₂, in₁), b = W₂b₁ + b₂ (out₂)."""
    weight = second.weight.double() @ first.weight.double()
    bias: Tensor | None = second.bias
    if first.bias is not None:
        bias = second.weight.double() @ first.bias.double() + (0 if bias is None else bias.double())
    return linear_from(weight, bias, like=second)


def linear_from(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A linear layer of the given weight (out, in) and bias (out), with the type and device of `like`."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(like.weight))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(like.weight))
    return layer


def set_module(graph: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(graph.get_submodule(parent), leaf, module)


def _next_linear(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The linear node that is the only user of this linear node's output, seen through nodes that pass it on unchanged."""
    if not is_linear(graph, node) or _calls_of(graph, node) > 1:
        return None
    current = node
    while len(current.users) == 1:
        current = next(iter(current.users))
        if is_linear(graph, current):
            return current if _calls_of(graph, current) == 1 else None
        if not isinstance(module_of(graph, current), nn.Identity):
            return None
    return None


def _calls_of(graph: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in graph.graph.nodes)


def _nonzeros(layer: nn.Linear) -> int:
    return sum(int(p.count_nonzero()) for p in layer.parameters())
