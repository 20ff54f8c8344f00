"""Residual branches: what an addition adds to a shortcut, and the parameters that alone decide
whether it adds anything."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import (
    Layer,
    ancestors,
    call_counts,
    is_addition,
    layers_of,
    module_of,
)
from slimfront.trainables.structure.targets.zeros import passes_zeros
from slimfront.trainables.torch_internals import function_name

_WEIGHTS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_PRODUCTS = ("mul", "multiply")
_WEIGHTED = {
    **{key: {"weight": 1, "bias": 2} for key in ("linear", "conv1d", "conv2d", "conv3d")},
    "addmm": {"mat2": 2, "input": 0},
}
"""Functions of layers, and where their weight and bias stand among the arguments."""
_NORMED = {
    **{key: {"weight": 3, "bias": 4} for key in ("batch_norm", "instance_norm")},
    **{key: {"weight": 2, "bias": 3} for key in ("layer_norm", "group_norm")},
}
"""The same of norms."""


@dataclass(frozen=True)
class Branch:
    """A residual branch: `addition` adds it to `shortcut`; it is zero if all of `parameters` are,
    which are those of its last layer, or of the norm behind it."""

    addition: Node
    shortcut: Node
    name: str
    """Of its last layer."""
    parameters: tuple[str, ...]
    layer: Layer | None = None
    """That layer with its batch norm, where it is a linear or convolutional one."""

    def nodes(self) -> set[Node]:
        """What computes it from what the shortcut has too."""
        (end,) = [side for side in self.addition.all_input_nodes if side is not self.shortcut]
        return ancestors(end) - ancestors(self.shortcut)

    def is_zero(self, graph: GraphModule) -> bool:
        """Whether it adds nothing."""
        for name in self.parameters:
            tensor = _tensor(graph, name)
            if bool(tensor.any()):
                return False
        return True


def residual_branches(graph: GraphModule) -> list[Branch]:
    """The branches of additions whose two sides come from one node, in order of execution.

    The branch is the side with more weight layers; the other one is the shortcut. From its end back
    to a layer, or to a norm with factors of its own, it must keep zeros: through dropout, moves of
    axes, and products, such as those with gates and layer scales. Nothing but the addition may read
    what lies on that way.
    """
    ends = _Ends(graph)
    found = []
    for node in graph.graph.nodes:
        if not is_addition(graph, node):
            continue
        sides = node.all_input_nodes
        if len(sides) != 2:  # x + x
            continue
        left, right = sides
        above_left = ancestors(left)
        above_right = ancestors(right)
        if above_left.isdisjoint(above_right):
            continue
        weights_left = ends.count_weights(above_left - above_right)
        weights_right = ends.count_weights(above_right - above_left)
        if weights_left == weights_right:
            continue
        branch, shortcut = left, right
        if weights_left < weights_right:
            branch, shortcut = right, left
        within = above_left | above_right
        for end in ends.behind(branch):
            if ends.is_read_within(end, within, addition=node):
                name, parameters, layer = ends.named(end)
                found.append(
                    Branch(
                        addition=node,
                        shortcut=shortcut,
                        name=name,
                        parameters=parameters,
                        layer=layer,
                    )
                )
                break
    return found


class _Ends:
    """The layers of a network that a branch can end in."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.counts: Counter[object] = call_counts(graph)
        self.reads: Counter[str] = Counter()
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                self.reads[str(node.target)] += 1
        self.layers = {layer.last: layer for layer in layers_of(graph)}

    def count_weights(self, nodes: set[Node]) -> int:
        """How many of these nodes have weights of their own."""
        kinds = (*_WEIGHTS, nn.MultiheadAttention)
        count = 0
        for node in nodes:
            module = module_of(self.graph, node)
            has_weights = isinstance(module, kinds)
            if has_weights or self._of_function(node, _WEIGHTED):
                count += 1
        return count

    def behind(self, node: Node) -> Iterator[Node]:
        """The layers and norms that a tensor is zero with, the nearest first."""
        if self._parameters(node):
            yield node
            return
        is_product = function_name(node) in _PRODUCTS
        if is_product and node.op != "call_module":
            for side in node.all_input_nodes:
                yield from self.behind(side)
            return
        if passes_zeros(self.graph, node) and node.args:
            first = node.args[0]
            if isinstance(first, Node):
                yield from self.behind(first)

    def is_read_within(self, node: Node, within: set[Node], addition: Node) -> bool:
        """Whether what a node makes is read on the way to an addition alone."""
        waiting = [node]
        seen = {node}
        while waiting:
            reader = waiting.pop()
            for user in reader.users:
                if user is addition or user in seen:
                    continue
                if user not in within:
                    return False
                seen.add(user)
                waiting.append(user)
        return True

    def named(self, node: Node) -> tuple[str, tuple[str, ...], Layer | None]:
        """The name of the layer that a node calls, the parameters that it is zero with, and the
        layer."""
        parameters = self._parameters(node)
        layer = self.layers.get(node)
        if layer is not None:
            return layer.name, parameters, layer
        first = parameters[0]
        owner, _, _ = first.rpartition(".")
        name = owner or first
        return name, parameters, None

    def _parameters(self, node: Node) -> tuple[str, ...]:
        """The parameters that what a node makes is zero with; none if it is no layer, or its
        parameters are read elsewhere too."""
        module = module_of(self.graph, node)
        if module is None:
            return self._of_function(node, _WEIGHTED | _NORMED)
        if self.counts[node.target] > 1:
            return ()
        name = str(node.target)
        if isinstance(module, nn.MultiheadAttention):
            name = f"{name}.out_proj"
            module = module.out_proj
        elif not isinstance(module, (*_WEIGHTS, *_NORMS)) or module.weight is None:
            return ()
        leaves = ["weight"]
        if getattr(module, "bias", None) is not None:
            leaves.append("bias")
        own = dict(module.named_parameters(recurse=False))
        for leaf in leaves:
            if leaf not in own:  # it is computed anew in each forward
                return ()
        return tuple(f"{name}.{leaf}" for leaf in leaves)

    def _of_function(self, node: Node, kinds: dict[str, dict[str, int]]) -> tuple[str, ...]:
        """The same of a function that is given parameters."""
        if node.op != "call_function":
            return ()
        places = kinds.get(function_name(node), {})
        found = []
        for keyword, place in places.items():
            argument = node.kwargs.get(keyword)
            if len(node.args) > place:
                argument = node.args[place]
            if argument is None:
                continue
            if not self._is_own_parameter(argument):
                return ()
            found.append(str(argument.target))
        return tuple(found)

    def _is_own_parameter(self, argument: object) -> TypeGuard[Node]:
        """Whether an argument is a parameter that nothing else reads."""
        if not isinstance(argument, Node):
            return False
        if argument.op != "get_attr":
            return False
        name = str(argument.target)
        if self.reads[name] > 1:
            return False
        if len(argument.users) > 1:
            return False
        tensor = _tensor(self.graph, name)
        return isinstance(tensor, nn.Parameter)


def _tensor(graph: GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = graph.get_submodule(owner)
    tensor: Tensor = getattr(module, leaf)
    return tensor
