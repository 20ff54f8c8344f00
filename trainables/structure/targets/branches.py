"""Residual branches: what an addition adds to a shortcut, and the parameters that alone decide
whether it adds anything."""

import operator
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
from slimfront.trainables.structure.tracing.shapes import NodeShapes
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
    """The branches of additions whose two sides come from one tensor, in order of execution: not
    those of two inputs, or of features and positions, and not one without which an input would not
    be looked at any more.

    The branch is the side with more weight layers; the other one is the shortcut. From its end back
    to a layer, or to a norm with factors of its own, it must keep zeros: through dropout, moves of
    axes, and products, such as those with gates and layer scales. Nothing but the addition may read
    what lies on that way.
    """
    ends = _Ends(graph)
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]

    def seen_without(addition: Node | None, branch: Node | None) -> set[Node]:
        return _inputs_among(_computed_from(output, addition, branch))

    seen = seen_without(None, None)
    found = []
    for node in graph.graph.nodes:
        if not is_addition(graph, node):
            continue
        sides = node.all_input_nodes
        if len(sides) != 2:  # x + x
            continue
        left, right = sides
        above_left = _computed_from(left)
        above_right = _computed_from(right)
        if above_left.isdisjoint(above_right):
            continue
        weights_left = ends.count_weights(above_left - above_right)
        weights_right = ends.count_weights(above_right - above_left)
        if weights_left == weights_right:
            continue
        branch, shortcut = left, right
        if weights_left < weights_right:
            branch, shortcut = right, left
        if seen_without(node, branch) < seen:
            continue
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


def keeps_shape(branch: Branch, shapes: NodeShapes) -> bool:
    """Whether the shortcut is what the addition makes, where the branch adds nothing: it is not
    made larger by it, as what is added to all places of an image."""
    return shapes[branch.shortcut] == shapes[branch.addition]


def branches_that_can_go(graph: GraphModule, shapes: NodeShapes) -> list[Branch]:
    """The residual branches whose shortcut can take the place of the sum."""
    return [branch for branch in residual_branches(graph) if keeps_shape(branch, shapes)]


def _computed_from(
    node: Node, addition: Node | None = None, branch: Node | None = None
) -> set[Node]:
    """The node, and all tensors that it is computed from, without what an `addition` adds of a
    `branch`; not those whose sizes alone are read, nor what holds several inputs."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        reader = waiting.pop()
        if reader in found or _holds_several(reader):
            continue
        found.add(reader)
        if _is_of_sizes(reader):
            continue
        for source in reader.all_input_nodes:
            if reader is not addition or source is not branch:
                waiting.append(source)
    return found


def _inputs_among(nodes: set[Node]) -> set[Node]:
    """The inputs of the network among some nodes: those of several, each by itself."""
    found = set()
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder" or any(_holds_several(source) for source in sources):
            found.add(node)
    return found


def _is_of_sizes(node: Node) -> bool:
    """Whether a node reads the shape, the type or the device of a tensor."""
    if node.target is getattr:
        return True
    return function_name(node) in ("size", "dim", "numel", "sym_size", "sym_numel")


def _holds_several(node: Node) -> bool:
    """Whether a node is what several inputs are taken from by name."""
    if node.op != "placeholder" or not node.users:
        return False
    return all(
        user.target is operator.getitem and isinstance(user.args[1], str) for user in node.users
    )


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
