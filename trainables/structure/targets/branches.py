"""Residual branches: what an addition adds to a shortcut, and the parameters that alone decide
whether it adds anything."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from slimfront.trainables.structure.graph import (
    Layer,
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
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
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

    addition: fx.Node
    shortcut: fx.Node
    name: str
    """Of its last layer."""
    parameters: tuple[str, ...]
    layer: Layer | None = None
    """That layer with its batch norm, where it is a linear or convolutional one."""

    def is_zero(self, graph: fx.GraphModule) -> bool:
        """Whether it adds nothing."""
        tensors = (_tensor(graph, name) for name in self.parameters)
        return not any(bool(tensor.any()) for tensor in tensors)


def residual_branches(graph: fx.GraphModule) -> list[Branch]:
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
        left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else (None, None)
        if left is None or right is None:  # x + x
            continue
        above_left, above_right = _ancestors(left), _ancestors(right)
        if not above_left & above_right:
            continue
        weights_left = ends.count_weights(above_left - above_right)
        weights_right = ends.count_weights(above_right - above_left)
        if weights_left == weights_right:
            continue
        branch, shortcut = (left, right) if weights_left > weights_right else (right, left)
        within = above_left | above_right
        for end in ends.behind(branch):
            if ends.is_read_within(end, within, node):
                name, parameters, layer = ends.named(end)
                found.append(Branch(node, shortcut, name, parameters, layer))
                break
    return found


class _Ends:
    """The layers of a network that a branch can end in."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.counts: Counter[object] = call_counts(graph)
        self.reads = Counter(
            str(node.target) for node in graph.graph.nodes if node.op == "get_attr"
        )
        self.layers = {layer.last: layer for layer in layers_of(graph)}

    def count_weights(self, nodes: set[fx.Node]) -> int:
        """How many of these nodes have weights of their own."""
        kinds = (*_WEIGHTS, nn.MultiheadAttention)
        modules = (isinstance(module_of(self.graph, node), kinds) for node in nodes)
        functions = (bool(self._of_function(node, _WEIGHTED)) for node in nodes)
        return sum(modules) + sum(functions)

    def behind(self, node: fx.Node) -> Iterator[fx.Node]:
        """The layers and norms that a tensor is zero with, the nearest first."""
        if self._parameters(node):
            yield node
            return
        if function_name(node) in _PRODUCTS and node.op != "call_module":
            for side in node.all_input_nodes:
                yield from self.behind(side)
        elif passes_zeros(self.graph, node):
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node):
                yield from self.behind(first)

    def is_read_within(self, node: fx.Node, within: set[fx.Node], addition: fx.Node) -> bool:
        """Whether what a node makes is read on the way to an addition alone."""
        waiting, seen = [node], {node}
        while waiting:
            for user in waiting.pop().users:
                if user is addition or user in seen:
                    continue
                if user not in within:
                    return False
                seen.add(user)
                waiting.append(user)
        return True

    def named(self, node: fx.Node) -> tuple[str, tuple[str, ...], Layer | None]:
        """The name of the layer that a node calls, the parameters that it is zero with, and the
        layer."""
        layer = self.layers.get(node)
        parameters = self._parameters(node)
        name = layer.name if layer is not None else parameters[0].rpartition(".")[0]
        return name or parameters[0], parameters, layer

    def _parameters(self, node: fx.Node) -> tuple[str, ...]:
        """The parameters that what a node makes is zero with; none if it is no layer, or its
        parameters are read elsewhere too."""
        module = module_of(self.graph, node)
        if module is None:
            return self._of_function(node, _WEIGHTED | _NORMED)
        if self.counts[node.target] > 1:
            return ()
        name = str(node.target)
        if isinstance(module, nn.MultiheadAttention):
            name, module = f"{name}.out_proj", module.out_proj
        elif not isinstance(module, (*_WEIGHTS, *_NORMS)) or module.weight is None:
            return ()
        leaves = ("weight",) if getattr(module, "bias", None) is None else ("weight", "bias")
        own = dict(module.named_parameters(recurse=False))
        # Those that are computed anew in each forward are no parameters.
        return tuple(f"{name}.{leaf}" for leaf in leaves) if own.keys() >= {*leaves} else ()

    def _of_function(self, node: fx.Node, kinds: dict[str, dict[str, int]]) -> tuple[str, ...]:
        """The same of a function that is given parameters."""
        places = kinds.get(function_name(node)) if node.op == "call_function" else None
        if places is None:
            return ()
        given = [
            node.args[place] if len(node.args) > place else node.kwargs.get(name)
            for name, place in places.items()
        ]
        names = []
        for argument in given:
            if argument is None:
                continue
            if not isinstance(argument, fx.Node) or argument.op != "get_attr":
                return ()
            name = str(argument.target)
            alone = self.reads[name] == 1 and len(argument.users) == 1
            if not alone or not isinstance(_tensor(self.graph, name), nn.Parameter):
                return ()
            names.append(name)
        return tuple(names)


def _tensor(graph: fx.GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(owner), leaf)
    return tensor


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it depends on."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found
