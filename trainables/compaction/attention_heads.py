"""Dead heads of attention: removed, with the constants that they output moved into the bias of the
output projection."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.layers import set_module, with_weights
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import call_counts, module_of, only_user


@dataclass(frozen=True)
class _Attended:
    """An attention with the projections around it; each of them is called only here."""

    node: fx.Node
    heads: Attention
    inputs: tuple[fx.Node, ...]
    """The nodes of the projections query, key and value."""
    out: fx.Node

    def keep_rows(self, graph: fx.GraphModule, keep: Tensor) -> None:
        """Leaves in the projections only the rows of the heads in `keep` (heads,) bool."""
        for node in self.inputs:
            layer = _linear(graph, node)
            rows = keep.repeat_interleave(layer.out_features // self.heads.heads)
            bias = None if layer.bias is None else layer.bias[rows]
            set_module(graph, str(node.target), with_weights(layer, layer.weight[rows], bias))
        self.heads.heads = int(keep.sum())


@torch.no_grad()
def remove_dead_heads(graph: fx.GraphModule, multiple: int = 1) -> list[Removed]:
    """Removes heads whose output is constant, or that nothing reads; outputs stay equal.

    A head is constant if the rows of its values are all zero: attention weights sum to 1, so it
    outputs its values' bias. It is unread if its columns of the output projection are zero. Where
    no head is left, the output projection reads the query's input with weight 0, if it is not
    larger then; else one head stays. Where any stays, as many more do as make the width of all of
    them a `multiple`, if there are so many.
    """
    removed = []
    for node in list(graph.graph.nodes):
        attended = _attended(graph, node)
        if attended is None:
            continue
        heads = attended.heads.heads
        value, out = _linear(graph, attended.inputs[2]), _linear(graph, attended.out)
        read = out.weight.unflatten(1, (heads, -1))  # (out, heads, width)
        constant = ~value.weight.unflatten(0, (heads, -1)).flatten(1).any(1)
        dead = constant | ~read.transpose(0, 1).flatten(1).any(1)
        query = _linear(graph, attended.inputs[0])
        projections = [*(_linear(graph, each) for each in attended.inputs), out]
        if query.in_features * out.out_features > sum(each.weight.numel() for each in projections):
            # The output projection would become larger than all of them.
            dead[0] &= not bool(dead.all())
        if not dead.all():
            width = read.shape[2]
            dead &= ~put_back(dead, multiple // math.gcd(multiple, width))
        constant &= dead
        if not dead.any():
            continue
        bias: Tensor | None = out.bias
        if value.bias is not None:
            moved = (read[:, constant].flatten(1).double()) @ value.bias.unflatten(0, (heads, -1))[
                constant
            ].flatten().double()
            if bool((moved != 0).any()):
                bias = moved + (0 if bias is None else bias.double())
        if dead.all():
            source = attended.inputs[0].args[0]
            assert isinstance(source, fx.Node)
            weight = out.weight.new_zeros(out.out_features, query.in_features)
            attended.out.replace_input_with(attended.node, source)
            graph.graph.eliminate_dead_code()
        else:
            weight = read[:, ~dead].flatten(1)
            attended.keep_rows(graph, ~dead)
        set_module(graph, str(attended.out.target), with_weights(out, weight, bias))
        removed.append(
            Removed(str(node.target).removesuffix(".heads"), int(dead.sum()), bool(dead.all()))
        )
    return removed


def _attended(graph: fx.GraphModule, node: fx.Node) -> _Attended | None:
    """The attention that the node calls, if its projections are linear layers that serve it
    alone."""
    heads, out, counts = module_of(graph, node), only_user(node), call_counts(graph)
    inputs = tuple(node.all_input_nodes[:3])
    if (
        not isinstance(heads, Attention)
        or out is None
        or len(inputs) < 3
        or inputs != node.args[:3]
    ):
        return None
    around = (*inputs, out)
    alone = all(counts[each.target] == 1 for each in (node, *around)) and all(
        only_user(each) is node for each in inputs
    )
    if not alone or not all(isinstance(module_of(graph, each), nn.Linear) for each in around):
        return None
    return _Attended(node, heads, inputs, out)


def _linear(graph: fx.GraphModule, node: fx.Node) -> nn.Linear:
    layer = module_of(graph, node)
    assert isinstance(layer, nn.Linear)
    return layer
