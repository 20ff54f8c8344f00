"""Dead units and channels: removed, with the constants that they output moved into the next layer's
bias."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import (
    bypass,
    nonnegative_when_trained,
    set_called,
    with_weights,
)
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import (
    Conv,
    WeightLayer,
    call_counts,
    calls,
    is_flatten,
    is_relu,
    module_of,
    only_user,
    rows,
    weight_layer,
)
from slimfront.trainables.structure.targets.activations import activated, is_elementwise

_POOLS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Linear: (),  # whose units are the last axis, which a pool would mix
    nn.Conv1d: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    nn.Conv2d: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    nn.Conv3d: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
}
"""What pools each of the units of a layer for itself."""
_AVERAGES = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
_UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Removed:
    """How many units of a layer were removed, and whether that was all of them, so that the layer
    went too."""

    layer: str
    units: int
    whole: bool


@dataclass(frozen=True)
class _Path:
    """A layer, its only reader, and what lies between them."""

    node: Node
    reader: Node
    layer: WeightLayer
    following: WeightLayer
    between: tuple[Node, ...]
    modules: tuple[nn.Module | None, ...]
    """The modules that the nodes in between call."""
    activations: tuple[Node, ...]
    """Those of the nodes in between that are activations."""

    def read_weights(self) -> Tensor:
        """The reader's weights by unit read: (out, units, positions); a flatten gives a unit
        several positions."""
        weight = self.following.weight
        outputs = weight.shape[0]
        units = self.layer.weight.shape[0]
        return weight.reshape(outputs, units, -1)

    def padded(self) -> bool:
        """Whether zeros are padded in between, or sums divided by another number: a constant unit
        would not be constant."""
        if any(_pads(module) for module in self.modules):
            return True
        if not isinstance(self.following, Conv):
            return False
        padding = self.following.padding
        if padding == "valid":
            return False
        return _any(padding)

    def spans_space(self) -> bool:
        """Whether the layer or its reader is a convolution."""
        if isinstance(self.layer, Conv):
            return True
        return isinstance(self.following, Conv)


@dataclass(frozen=True)
class _Staying:
    """Which units of a layer stay; each is of the units, bool."""

    keep: Tensor
    alive: Tensor
    """Those whose weights stay; the others that are kept get weights of 0."""
    constant: Tensor
    """Those whose output moves into the reader's bias, as far as it is read."""


def _pads(module: nn.Module | None) -> bool:
    """Whether it is a pool that takes averages of more than its inputs."""
    if not isinstance(module, _AVERAGES):
        return False
    if _any(module.padding):
        return True
    divisor = getattr(module, "divisor_override", None)
    return divisor is not None


def _any(padding: str | int | tuple[int, ...]) -> bool:
    if isinstance(padding, tuple):
        return any(padding)
    return bool(padding)


@torch.no_grad()
def remove_dead_units(graph: GraphModule, multiple: int = 1) -> list[Removed]:
    """Removes hidden units and channels that are constant, or that nothing reads, until there are
    none; outputs stay equal.

    A unit is constant if its incoming weights are all zero (it gives what activations make of its
    bias), or if its input is non-negative, its incoming weights and bias are all ≤ 0, and a ReLU
    follows (then of 0, which the ReLU makes of such a bias). It is
    unread if its outgoing weights are zero. A constant other than 0 stays where padding lies behind
    it. A layer that would keep no unit goes as a whole if its reader can read the layer's input
    instead, with weight 0, and is not larger then; else it keeps one unit. As many more stay, with
    weights of 0, as make the number of those that stay a `multiple`, if there are so many.
    """
    removed: list[Removed] = []
    while True:  # what goes in one pass can leave more dead for the next
        gone = _one_pass(graph, multiple)
        if not gone:
            return removed
        removed += gone


def _one_pass(graph: GraphModule, multiple: int) -> list[Removed]:
    """Removes what is dead once from each layer."""
    nonnegative = nonnegative_when_trained(graph)
    counts = call_counts(graph)
    removed = []
    for node in list(graph.graph.nodes):
        path = _path(graph, node, counts)
        if path is None:
            continue
        input_nonnegative = node.args[0] in nonnegative
        gone = _remove(graph, path, multiple, input_nonnegative=input_nonnegative)
        if gone is not None:
            removed.append(gone)
    return removed


def _path(graph: GraphModule, node: Node, counts: Counter[object]) -> _Path | None:
    """The way from this layer node to the layer that alone reads it, through activations, pooling
    and flatten; None if another."""
    layer = weight_layer(graph, node)
    if layer is None:
        return None
    if counts[node.target] > 1:
        return None
    between: list[Node] = []
    activations: list[Node] = []
    current = only_user(node)
    while current is not None:
        following = weight_layer(graph, current)
        if following is not None:
            if counts[current.target] > 1:
                return None
            if not _reads_units_in_order(graph, layer, following, between):
                return None
            modules = [module_of(graph, each) for each in between]
            return _Path(
                node=node,
                reader=current,
                layer=layer,
                following=following,
                between=tuple(between),
                modules=tuple(modules),
                activations=tuple(activations),
            )
        if is_elementwise(graph, current):
            activations.append(current)
        elif not _passes_units_on(graph, layer, current):
            return None
        between.append(current)
        current = only_user(current)
    return None


def _passes_units_on(graph: GraphModule, layer: WeightLayer, node: Node) -> bool:
    """Whether a node keeps the layer's units apart and in order."""
    if is_flatten(graph, node):
        return True
    known = (*_pools(layer), *_UNCHANGED)
    return calls(graph, node, known)


def _pools(layer: WeightLayer) -> tuple[type[nn.Module], ...]:
    kind = next(kind for kind in _POOLS if isinstance(layer, kind))
    return _POOLS[kind]


def _reads_units_in_order(
    graph: GraphModule, layer: WeightLayer, following: WeightLayer, between: list[Node]
) -> bool:
    """Whether the reader's inputs are the layer's units one after another, each with all its
    positions."""
    shapes = [node for node in between if is_flatten(graph, node)]
    units = layer.weight.shape[0]
    inputs = following.weight.shape[1]
    if type(layer) is type(following):
        return units == inputs and not shapes
    if not isinstance(layer, Conv):
        return False
    if len(shapes) != 1:
        return False
    if inputs % units:
        return False
    return _keeps_examples_apart(graph, shapes[0])


def _keeps_examples_apart(graph: GraphModule, node: Node) -> bool:
    """Whether a node flattens all axes but the first."""
    module = module_of(graph, node)
    if isinstance(module, nn.Flatten):
        axes = (module.start_dim, module.end_dim)
        return axes == (1, -1)
    if node.target not in (torch.flatten, "flatten"):
        return False
    if node.kwargs:
        return False
    return node.args[1:] == (1,)


def _remove(
    graph: GraphModule, path: _Path, multiple: int, *, input_nonnegative: bool
) -> Removed | None:
    """Removes the units of a layer that are constant, or that its reader does not read; None if
    none goes."""
    constant, value = _constant_units(graph, path, input_nonnegative)
    read = path.read_weights()
    is_read = _any_along(read, (0, 2))
    needed = is_read & ~constant
    if needed.all():
        return None
    staying = _staying(path, needed, constant, multiple)
    gone = ~staying.keep
    count = int(gone.sum())
    if count == 0:
        return None
    is_moved = staying.constant & is_read
    output = torch.where(is_moved, value, 0)
    bias = _moved_into_bias(path.following, read, output)
    whole = count == len(gone)
    columns = _pass_layer_by(graph, path) if whole else _keep_units(graph, path, staying)
    reader = with_weights(path.following, columns, bias)
    set_called(graph, path.reader, reader)
    return Removed(
        layer=str(path.node.target),
        units=count,
        whole=whole,
    )


def _constant_units(
    graph: GraphModule, path: _Path, input_nonnegative: bool
) -> tuple[Tensor, Tensor]:
    """Which units the reader sees as constants, (units,) bool, and their output, (units,)."""
    weight = path.layer.weight.flatten(1)
    bias = path.layer.bias
    if bias is None:
        bias = weight.new_zeros(len(weight))
    constant = ~_any_along(weight, (1,))
    if input_nonnegative and path.activations and is_relu(graph, path.activations[0]):
        no_weight_above_0 = (weight <= 0).all(1)
        constant |= no_weight_above_0 & (bias <= 0)
    value = activated(graph, path.activations, bias)
    if path.padded():
        constant = constant & (value == 0)
    return constant, value


def _staying(path: _Path, needed: Tensor, constant: Tensor, multiple: int) -> _Staying:
    """Which units stay if only those that are `needed` have to: none, where the layer can go."""
    keep = alive = needed
    if not needed.any():
        first = needed.clone()
        first[0] = True
        if path.spans_space():
            # The shape of what the reader reads would change.
            keep = alive = first
            constant = constant & ~first
        elif _is_larger_without(path.layer, path.following):
            # Of a bottleneck: without it, the reader would have many more weights, all of them
            # zero.
            keep = first
        else:
            return _Staying(keep, alive, constant)
    return _Staying(
        keep=keep | put_back(~keep, multiple),
        alive=alive,
        constant=constant,
    )


def _pass_layer_by(graph: GraphModule, path: _Path) -> Tensor:
    """Has the reader read what the layer reads; its weights for that, which are 0."""
    nodes = [path.node, *path.between]
    for node in reversed(nodes):
        bypass(graph, node)
    before = path.following.weight
    _, inputs, *_ = path.layer.weight.shape
    return before.new_zeros(len(before), inputs)


def _any_along(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Whether any entry along these axes is not 0: as `any` along each, which takes four times as
    long."""
    nonzero: Tensor = torch.linalg.vector_norm(weight, ord=0, dim=axes)
    return nonzero > 0


def _keep_units(graph: GraphModule, path: _Path, staying: _Staying) -> Tensor:
    """Leaves a layer the units that stay alone; the weights of its reader for them."""
    layer = path.layer
    read = path.read_weights()
    kept = staying.keep.nonzero().flatten()
    share = staying.alive[kept].to(read)
    """1, and 0 where nothing but a multiple needs a unit: (kept,)."""
    weight = layer.weight[kept]
    bias = None
    if layer.bias is not None:
        bias = layer.bias[kept] * share
    smaller = with_weights(
        like=layer,
        weight=weight * rows(share, weight),
        bias=bias,
    )
    set_called(graph, path.node, smaller)
    columns = read[:, kept] * share.view(-1, 1)
    outputs, _, *kernel = path.following.weight.shape
    return columns.reshape(outputs, -1, *kernel)


def _moved_into_bias(following: WeightLayer, read: Tensor, output: Tensor) -> Tensor | None:
    """The bias of a reader with what constant units give it: `read` (out, units, …), `output`
    (units)."""
    bias: Tensor | None = following.bias
    if not output.any():
        return bias
    matrix = read.double().sum(2)  # (out of following, units)
    moved = matrix @ output.double()
    if bias is None:
        return moved
    return moved + bias.double()


def _is_larger_without(layer: WeightLayer, following: WeightLayer) -> bool:
    """Whether a reader of the layer's inputs would have more weights than the layer and its reader
    have together."""
    units, inputs, *_ = layer.weight.shape
    outputs, *_ = following.weight.shape
    of_both = inputs * units + units * outputs
    without = inputs * outputs
    return without > of_both
