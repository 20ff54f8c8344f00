"""What is known about a network's structure, found by tracing it with torch.fx."""

import functools
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.tracing.trace import RANK

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
WeightLayer = nn.Linear | Conv
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_WeightAndBias = tuple[Tensor, Tensor]
_ScaleAndShift = tuple[Tensor, Tensor]
"""What a batch norm multiplies by, and what it adds then, (channels,) each."""

_RELUS: tuple[object, ...] = (nn.ReLU, torch.relu, F.relu, "relu", "relu_")
_ADDITIONS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
SHAPES: tuple[object, ...] = (
    *(nn.Flatten, torch.flatten),
    *("flatten", "view", "reshape", "contiguous"),
)
"""What only changes the shape."""
_ROUNDING_EPS = 16
"""Negative entries of a folded layer down to this many machine epsilons of its largest entry are
rounding errors of folding."""


_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def module_of(graph: GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls, or None if it does not call one."""
    if not isinstance(node, Node):
        return None
    if node.op != "call_module":
        return None
    return submodule(graph, str(node.target))


def submodule(graph: GraphModule, name: str) -> nn.Module:
    """The module of that name, as `get_submodule` gives it, which takes ten times as long."""
    module: nn.Module | None = graph
    for part in name.split("."):
        assert module is not None
        module = getattr(module, part)
    assert module is not None
    return module


def calls(graph: GraphModule, node: object, kinds: tuple[object, ...]) -> bool:
    """Whether a node calls one of `kinds`: types of modules, functions, or names of tensor
    methods."""
    if not isinstance(node, Node):
        return False
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, _types(kinds))
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in kinds


@functools.cache
def _types(kinds: tuple[object, ...]) -> tuple[type, ...]:
    types = []
    for kind in kinds:
        if isinstance(kind, type):
            types.append(kind)
    return tuple(types)


def is_relu(graph: GraphModule, node: object) -> bool:
    """Whether the node applies a ReLU."""
    return calls(graph, node, _RELUS)


def is_addition(graph: GraphModule, node: object) -> bool:
    """Whether the node adds two outputs of the network."""
    if not isinstance(node, Node):
        return False
    if not calls(graph, node, _ADDITIONS):
        return False
    if node.kwargs:  # torch.add has a factor, `alpha`
        return False
    added = [argument for argument in node.args if isinstance(argument, Node)]
    return len(added) == 2


def is_flatten(graph: GraphModule, node: object) -> bool:
    """Whether the node only changes the shape."""
    return calls(graph, node, SHAPES)


def weight_layer(graph: GraphModule, node: object, *, grouped: bool = False) -> WeightLayer | None:
    """The linear or convolutional layer that the node calls, if it does: of one group, unless
    `grouped` says otherwise."""
    module = module_of(graph, node)
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, Conv) and (grouped or module.groups == 1):
        return module
    return None


def tensor_at(network: GraphModule, name: str) -> Any:
    """The parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    holder: nn.Module = network
    if owner:
        holder = submodule(network, owner)
    return getattr(holder, leaf)


def batch_norm(graph: GraphModule, node: object) -> BatchNorm | None:
    """The batch norm with running statistics that the node calls, if it does."""
    module = module_of(graph, node)
    if isinstance(module, BatchNorm) and module.running_mean is not None:
        return module
    return None


def only_user(node: Node) -> Node | None:
    """The one node that reads this node's output, or None if there are more or none."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user


def call_counts(graph: GraphModule) -> Counter[object]:
    """How often each module is called, by name: one that is called twice cannot be changed for one
    place only.

    Nor can one whose parameters another module, or the network's own code, holds too: it counts as
    called twice.
    """
    counts: Counter[object] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_module":
            counts[node.target] += 1
    for name in tied_modules(graph):
        if counts[name]:
            counts[name] += 1
    return counts


def tied_modules(network: nn.Module) -> set[str]:
    """The names of the modules that hold a parameter which others hold too, by identity, or which
    the network's own code reads."""
    holders: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        module, _, _ = name.rpartition(".")
        identity = id(parameter)
        names = holders.setdefault(identity, [])
        names.append(module)
    for parameter in _read_by_code(network):
        holders.setdefault(id(parameter), []).append("")
    found: set[str] = set()
    for names in holders.values():
        if len(names) > 1:
            found.update(names)
    return found


def _read_by_code(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that the code of a traced network reads itself, each as often as it does."""
    if not isinstance(network, GraphModule):
        return
    for node in network.graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(submodule(network, owner) if owner else network, leaf)
        if isinstance(tensor, nn.Parameter):
            yield tensor


@dataclass(frozen=True)
class Layer:
    """A weight layer, with the batch norm behind it if there is one: what would be one layer once
    folded."""

    name: str
    layer: WeightLayer
    norm: BatchNorm | None
    node: Node
    last: Node
    """The node of the batch norm, or of the layer itself."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, as they are now, with those of the batch norm."""
        layer = self.layer
        norm = self.norm
        found = [layer.weight]
        if layer.bias is not None:
            found.append(layer.bias)
        if norm is None:
            return tuple(found)
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                found.append(tensor)
        return tuple(found)

    def folded(self) -> _WeightAndBias:
        """Weight (out, in, …) and bias (out) as if the batch norm were folded in,
        differentiable."""
        weight = self.layer.weight
        bias = self.layer.bias
        if bias is None:
            outputs = len(weight)
            bias = weight.new_zeros(outputs)
        if self.norm is None:
            return weight, bias
        scale, shift = self._scale_and_shift()
        folded_weight = weight * rows(scale, weight)
        folded_bias = bias * scale + shift
        return folded_weight, folded_bias

    @torch.no_grad()
    def write_folded(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the parameters so that `folded` gives these; zeros of `weight` stay exactly zero.

        A row whose batch norm scales by 0 is left alone. Without a bias or a batch norm, `bias` is
        not written.
        """
        own = self.layer
        if self.norm is None:
            own.weight.copy_(weight)
            if own.bias is not None:
                own.bias.copy_(bias)
            return
        scale, shift = self._scale_and_shift()
        alive = scale != 0
        divisor = torch.where(alive, scale, 1)
        unscaled = weight / rows(divisor, weight)
        alive_rows = rows(alive, weight)
        new_weight = torch.where(alive_rows, unscaled, own.weight)
        own.weight.copy_(new_weight)
        old_bias = shift
        if own.bias is not None:
            old_bias = own.bias * scale + shift
        missing = bias - old_bias
        change = torch.where(alive, missing, 0)
        self.norm.bias.add_(change)

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiplies the folded rows [W | b] by `factors` (out), through the batch norm's affine
        part if there is one.

        Scaling the weights in front of a batch norm would do nothing: it normalises them again in
        the next batch.
        """
        norm = self.norm
        if norm is not None:
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            return
        weight = self.layer.weight
        bias = self.layer.bias
        by_row = rows(factors, weight)
        weight.mul_(by_row)
        if bias is not None:
            bias.mul_(factors)

    def _scale_and_shift(self) -> _ScaleAndShift:
        norm = self.norm
        assert norm is not None
        mean = norm.running_mean
        assert norm.running_var is not None
        assert mean is not None
        variance = norm.running_var + norm.eps
        deviation = variance.sqrt()
        scale = norm.weight / deviation
        centre = mean * scale
        shift = norm.bias - centre
        return scale, shift

    def active(self) -> Tensor:
        """Whether the folded [W | b] has a negative entry beyond rounding (arXiv 2006.15604,
        section 2); a boolean scalar."""
        with torch.no_grad():
            weight, bias = self.folded()
            return has_negative_entry(
                weight,
                bias,
                exact=self.norm is None,
            )


def rows(per_row: Tensor, weight: Tensor) -> Tensor:
    """(out) reshaped so that it broadcasts over the rows of a weight (out, in, …)."""
    axes = weight.dim() - 1
    others = [1] * axes
    return per_row.view(-1, *others)


def has_negative_entry(weight: Tensor, bias: Tensor, *, exact: bool = True) -> Tensor:
    """Whether [W | b] has a negative entry; without `exact`, one beyond `rounding`. A boolean
    scalar."""
    of_weight = weight.min()
    of_bias = bias.min()
    lowest = torch.minimum(of_weight, of_bias)
    if exact:
        return lowest < 0
    error = rounding(weight, bias, weight.dtype)
    return lowest < -error


def rounding(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """How far folding in `dtype` may be off in an entry of this [W | b]; a scalar.

    In half precision that would be an eighth of the largest entry, which is no rounding: there it
    is as in float32, so that a layer is rather called active.
    """
    of_weight = weight.abs().max()
    of_bias = bias.abs().max()
    largest = torch.maximum(of_weight, of_bias)
    finest = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    relative = _ROUNDING_EPS * finest
    return relative * largest


def layers_of(graph: GraphModule, *, grouped: bool = False) -> list[Layer]:
    """The weight layers of a network that are called once, in order of execution, each with its
    batch norm if any; convolutions of several groups too, where `grouped` says so.

    A batch norm belongs to a layer whose units are its channels. Behind a linear layer that is so
    only where the output is of two axes, (N, units): of more, the norm's channels are the second
    axis, and the units the last. So ranks must be known there.
    """
    counts = call_counts(graph)
    found = []
    for node in graph.graph.nodes:
        layer = weight_layer(graph, node, grouped=grouped)
        if layer is None or counts[node.target] > 1:
            continue
        norm: BatchNorm | None = None
        last = node
        after = only_user(node)
        if after is not None and counts[after.target] == 1:
            norm = _norm_of_units(graph, node, layer, after)
        if norm is not None:
            last = after
        whole = Layer(
            name=str(node.target),
            layer=layer,
            norm=norm,
            node=node,
            last=last,
        )
        found.append(whole)
    return found


def _norm_of_units(
    graph: GraphModule, node: Node, layer: WeightLayer, after: Node
) -> BatchNorm | None:
    """The batch norm that `after` calls, if it has factors and its channels are a layer's units."""
    norm = batch_norm(graph, after)
    if norm is None or not norm.affine:
        return None
    for kind, norm_kind in _NORM_OF.items():
        if isinstance(layer, kind) and not isinstance(norm, norm_kind | nn.SyncBatchNorm):
            return None
    if isinstance(layer, nn.Linear):
        rank = node.meta.get(RANK)
        if rank != 2:
            return None
    return norm


def ancestors(node: Node) -> set[Node]:
    """The node, and all that it is computed from."""
    found = {node}
    waiting = [node]
    while waiting:
        reader = waiting.pop()
        for source in reader.all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def arguments(node: object) -> tuple[object, ...]:
    """All that a node is given, by place and by name."""
    if not isinstance(node, Node):
        return ()
    by_name = node.kwargs.values()
    return (*node.args, *by_name)
