"""Dead heads of attention: removed, with the constants that they output moved into the bias of the
output projection."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import set_called, with_weights
from slimfront.trainables.compaction.units import Removed
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import call_counts, module_of, only_user


@dataclass(frozen=True)
class _Attended:
    """An attention with the projections around it; each of them is called only here."""

    graph: GraphModule
    node: Node
    attention: Attention
    inputs: tuple[Node, ...]
    """The nodes of the projections query, key and value."""
    out: Node

    def inputs_projections(self) -> list[nn.Linear]:
        """The projections query, key and value."""
        return [_linear(self.graph, node) for node in self.inputs]

    def out_projection(self) -> nn.Linear:
        """The projection of the output."""
        return _linear(self.graph, self.out)

    def by_head(self, rows: Tensor) -> Tensor:
        """Rows of a projection, or entries of its bias, by head: (heads, width, …)."""
        split: Tensor = rows.unflatten(0, (self.attention.heads, -1))
        return split

    def read_by_head(self) -> Tensor:
        """The weights of the output projection by head: (out, heads, width)."""
        weight = self.out_projection().weight
        split: Tensor = weight.unflatten(1, (self.attention.heads, -1))
        return split

    def is_larger_without(self) -> bool:
        """Whether an output projection that reads the query's input has more weights than all
        projections have."""
        out = self.out_projection()
        projections = [*self.inputs_projections(), out]
        weights = 0
        for each in projections:
            weights += each.weight.numel()
        query = projections[0]
        without = query.in_features * out.out_features
        return without > weights

    def keep_rows(self, keep: Tensor) -> None:
        """Leaves in the projections only the rows of the heads in `keep` (heads,) bool."""
        for node in self.inputs:
            layer = _linear(self.graph, node)
            width = layer.out_features // self.attention.heads
            rows = keep.repeat_interleave(width)
            bias = None
            if layer.bias is not None:
                bias = layer.bias[rows]
            narrower = with_weights(layer, layer.weight[rows], bias)
            set_called(self.graph, node, narrower)
        self.attention.heads = int(keep.sum())

    def pass_by(self) -> None:
        """Has the output projection read what the query's projection reads."""
        source = self.inputs[0].args[0]
        assert isinstance(source, Node)
        self.out.replace_input_with(self.node, source)
        self.graph.graph.eliminate_dead_code()


@torch.no_grad()
def remove_dead_heads(graph: GraphModule, multiple: int = 1) -> list[Removed]:
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
        gone = _remove(attended, multiple)
        if gone is not None:
            removed.append(gone)
    return removed


def _remove(attended: _Attended, multiple: int) -> Removed | None:
    """Removes the dead heads of one attention; None if none goes."""
    query, _, value = attended.inputs_projections()
    out = attended.out_projection()
    read = attended.read_by_head()
    values = attended.by_head(value.weight)
    has_value = values.flatten(1).any(1)
    readers = read.transpose(0, 1)
    is_read = readers.flatten(1).any(1)
    dead = _dead_heads(attended, has_value & is_read, multiple)
    if not dead.any():
        return None
    alive = ~dead
    bias: Tensor | None = out.bias
    if value.bias is not None:
        constant = dead & ~has_value
        output = attended.by_head(value.bias)[constant]
        bias = _with_constant(
            bias,
            matrix=read[:, constant].flatten(1),
            output=output.flatten(),
        )
    whole = not alive.any()
    if whole:
        weight = out.weight.new_zeros(out.out_features, query.in_features)
        attended.pass_by()
    else:
        weight = read[:, alive].flatten(1)
        attended.keep_rows(alive)
    reader = with_weights(out, weight, bias)
    set_called(attended.graph, attended.out, reader)
    name = str(attended.node.target)
    return Removed(
        layer=name.removesuffix(".heads"),
        units=int(dead.sum()),
        whole=whole,
    )


def _dead_heads(attended: _Attended, needed: Tensor, multiple: int) -> Tensor:
    """Which heads go if only those that are `needed` have to stay: (heads,) bool."""
    dead = ~needed
    if dead.all() and attended.is_larger_without():
        dead[0] = False
    if dead.all():
        return dead
    width = attended.read_by_head().shape[2]
    heads_at_once = multiple // math.gcd(multiple, width)
    return dead & ~put_back(dead, heads_at_once)


def _with_constant(bias: Tensor | None, matrix: Tensor, output: Tensor) -> Tensor | None:
    """The bias (out,) of a projection by `matrix` (out, width) with what a constant `output`
    (width,) gives it."""
    moved = matrix.double() @ output.double()
    changes = moved != 0
    if not changes.any():
        return bias
    before: Tensor | int = 0
    if bias is not None:
        before = bias.double()
    return moved + before


def _attended(graph: GraphModule, node: Node) -> _Attended | None:
    """The attention that the node calls, if its projections are linear layers that serve it
    alone."""
    attention = module_of(graph, node)
    if not isinstance(attention, Attention):
        return None
    out = only_user(node)
    if out is None:
        return None
    inputs = tuple(node.all_input_nodes[:3])
    if len(inputs) < 3:
        return None
    if inputs != node.args[:3]:
        return None
    for each in inputs:
        if only_user(each) is not node:
            return None
    counts = call_counts(graph)
    if counts[node.target] != 1:
        return None
    for each in (*inputs, out):
        if counts[each.target] != 1:
            return None
        if not isinstance(module_of(graph, each), nn.Linear):
            return None
    return _Attended(
        graph=graph,
        node=node,
        attention=attention,
        inputs=inputs,
        out=out,
    )


def _linear(graph: GraphModule, node: Node) -> nn.Linear:
    layer = module_of(graph, node)
    assert isinstance(layer, nn.Linear)
    return layer
