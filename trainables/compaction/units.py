"""Dead units: removed, with the constants that they output moved into the next layer's bias."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from trainables.compaction.merge import linear_from, set_module
from trainables.graph import is_linear, is_relu, nonnegative_nodes


@dataclass(frozen=True)
class Removed:
    """How many units of a layer were removed, and whether that was all of them, so that the layer went too."""

    layer: str
    units: int
    whole: bool


@torch.no_grad()
def remove_dead_units(graph: fx.GraphModule) -> list[Removed]:
    """Removes hidden units that are constant, or that nothing reads, until there are none; outputs stay equal.

    A unit is constant if its incoming weights are all zero (output b, or ReLU(b)), or if its input is non-negative,
    its incoming weights and bias are all ≤ 0, and a ReLU follows (output 0). It is unread if its outgoing weights are
    zero. A layer that would keep no unit goes as a whole: its reader keeps the bias, and reads the layer's input with
    weight 0.
    """
    removed: list[Removed] = []
    while True:
        nonnegative = nonnegative_nodes(graph, trained=True)
        found = None
        for node in graph.graph.nodes:
            reader, relu = _reader(graph, node)
            if reader is not None:
                found = _remove(graph, node, reader, relu, input_nonnegative=node.args[0] in nonnegative)
                if found:
                    break  # what is dead may have changed everywhere
        if not found:
            return removed
        removed.append(found)


def _reader(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The linear node that alone reads this linear node, directly or through one ReLU; and whether there is a ReLU."""
    if not is_linear(graph, node) or len(node.users) != 1:
        return None, False
    following = next(iter(node.users))
    relu = is_relu(graph, following)
    if relu:
        if len(following.users) != 1:
            return None, False
        following = next(iter(following.users))
    calls = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    once = calls.count(node.target) == 1 and calls.count(following.target) == 1
    return (following if once and is_linear(graph, following) else None), relu


def _remove(graph: fx.GraphModule, node: fx.Node, reader: fx.Node, relu: bool, *, input_nonnegative: bool) -> Removed | None:
    layer, source = graph.get_submodule(str(node.target)), node.args[0]
    following = graph.get_submodule(str(reader.target))
    assert isinstance(layer, nn.Linear) and isinstance(following, nn.Linear) and isinstance(source, fx.Node)  # _reader looked
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
    constant, value = _constants(layer.weight, bias, relu=relu, input_nonnegative=input_nonnegative)
    unread = (following.weight == 0).all(0)
    keep = ~(constant | unread)
    count = int((~keep).sum())
    if count == 0:
        return None
    moved = following.weight.double() @ torch.where(constant, value, 0).double()  # (out of following)
    new_bias: Tensor | None = following.bias
    if bool((moved != 0).any()):
        new_bias = moved + (0 if following.bias is None else following.bias.double())
    whole = count == layer.out_features
    if whole:
        weight = following.weight.new_zeros(following.out_features, layer.in_features)
        for gone in ([next(iter(node.users))] if relu else []) + [node]:
            gone.replace_all_uses_with(source)
            graph.graph.erase_node(gone)
    else:
        weight = following.weight[:, keep]
        kept_bias = None if layer.bias is None else bias[keep]
        set_module(graph, str(node.target), linear_from(layer.weight[keep], kept_bias, layer))
    set_module(graph, str(reader.target), linear_from(weight, new_bias, following))
    return Removed(str(node.target), count, whole)


def _constants(weight: Tensor, bias: Tensor, *, relu: bool, input_nonnegative: bool) -> tuple[Tensor, Tensor]:
    """Which units are constant, (units,) bool, and their output, (units,)."""
    unfed = (weight == 0).all(1)
    value = bias.clamp(min=0) if relu else bias
    if not (relu and input_nonnegative):
        return unfed, value
    silent = (weight <= 0).all(1) & (bias <= 0)
    return unfed | silent, torch.where(silent, 0, value)
