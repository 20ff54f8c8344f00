"""Dead units and channels: removed, with the constants that they output moved into the next layer's
bias."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.layers import (
    bypass,
    nonnegative_when_trained,
    set_module,
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
    weight_layer,
)

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

    node: fx.Node
    reader: fx.Node
    layer: WeightLayer
    following: WeightLayer
    between: tuple[fx.Node, ...]
    modules: tuple[nn.Module | None, ...]
    """The modules that the nodes in between call."""
    relu: bool

    def read_weights(self) -> Tensor:
        """The reader's weights by unit read: (out, units, positions); a flatten gives a unit
        several positions."""
        weight = self.following.weight
        return weight.reshape(weight.shape[0], self.layer.weight.shape[0], -1)

    def padded(self) -> bool:
        """Whether zeros are padded in between, or sums divided by another number: a constant unit
        would not be constant."""
        pools = [module for module in self.modules if isinstance(module, _AVERAGES)]
        if any(
            _any(pool.padding) or getattr(pool, "divisor_override", None) is not None
            for pool in pools
        ):
            return True
        return (
            isinstance(self.following, Conv)
            and self.following.padding != "valid"
            and _any(self.following.padding)
        )


def _any(padding: str | int | tuple[int, ...]) -> bool:
    return any(padding) if isinstance(padding, tuple) else bool(padding)


@torch.no_grad()
def remove_dead_units(graph: fx.GraphModule, multiple: int = 1) -> list[Removed]:
    """Removes hidden units and channels that are constant, or that nothing reads, until there are
    none; outputs stay equal.

    A unit is constant if its incoming weights are all zero (output b, or ReLU(b)), or if its input
    is non-negative, its incoming weights and bias are all ≤ 0, and a ReLU follows (output 0). It is
    unread if its outgoing weights are zero. A constant other than 0 stays where padding lies behind
    it. A layer that would keep no unit goes as a whole if its reader can read the layer's input
    instead, with weight 0, and is not larger then; else it keeps one unit. As many more stay, with
    weights of 0, as make the number of those that stay a `multiple`, if there are so many.
    """
    removed: list[Removed] = []
    while True:  # what goes in one pass can leave more dead for the next
        nonnegative = nonnegative_when_trained(graph)
        counts = call_counts(graph)
        before = len(removed)
        for node in list(graph.graph.nodes):
            path = _path(graph, node, counts)
            if path is not None:
                known = node.args[0] in nonnegative
                gone = _remove(graph, path, multiple, input_nonnegative=known)
                removed += [gone] if gone else []
        if len(removed) == before:
            return removed


def _path(graph: fx.GraphModule, node: fx.Node, counts: Counter[object]) -> _Path | None:
    """The way from this layer node to the layer that alone reads it, through ReLU, pooling and
    flatten; None if another."""
    layer = weight_layer(graph, node)
    if layer is None or counts[node.target] > 1:
        return None
    between: list[fx.Node] = []
    relu = False
    current = only_user(node)
    while current is not None:
        following = weight_layer(graph, current)
        if following is not None:
            if counts[current.target] > 1 or not _reads_units_in_order(
                graph, layer, following, between
            ):
                return None
            modules = tuple(module_of(graph, n) for n in between)
            return _Path(node, current, layer, following, tuple(between), modules, relu)
        if is_relu(graph, current):
            relu = True
        elif not (
            calls(graph, current, (*_pools(layer), *_UNCHANGED)) or is_flatten(graph, current)
        ):
            return None
        between.append(current)
        current = only_user(current)
    return None


def _pools(layer: WeightLayer) -> tuple[type[nn.Module], ...]:
    return next(pools for kind, pools in _POOLS.items() if isinstance(layer, kind))


def _reads_units_in_order(
    graph: fx.GraphModule, layer: WeightLayer, following: WeightLayer, between: list[fx.Node]
) -> bool:
    """Whether the reader's inputs are the layer's units one after another, each with all its
    positions."""
    shapes = [node for node in between if is_flatten(graph, node)]
    units, inputs = layer.weight.shape[0], following.weight.shape[1]
    if type(layer) is type(following):
        return units == inputs and not shapes
    if not isinstance(layer, Conv) or len(shapes) != 1 or inputs % units:
        return False
    module = module_of(graph, shapes[0])
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return (
        shapes[0].target in (torch.flatten, "flatten")
        and shapes[0].args[1:] == (1,)
        and not shapes[0].kwargs
    )


def _remove(
    graph: fx.GraphModule, path: _Path, multiple: int, *, input_nonnegative: bool
) -> Removed | None:
    layer, following = path.layer, path.following
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.weight.shape[0])
    constant, value = _constants(
        layer.weight.flatten(1), bias, relu=path.relu, input_nonnegative=input_nonnegative
    )
    if path.padded():
        constant = constant & (value == 0)
    read = path.read_weights()
    read_at_all = _any_along(read, (0, 2))
    keep = read_at_all & ~constant
    if bool(keep.all()):
        return None
    whole = not bool(keep.any())
    spans_space = isinstance(layer, Conv) or isinstance(following, Conv)
    emptied = False
    if whole and spans_space:
        keep[0] = True  # the shape of what the reader reads would change
        constant = constant & ~keep
        whole = False
    elif whole and _is_larger_without(layer, following):
        # Of a bottleneck: without it, the reader would have many more weights, all of them zero.
        keep[0] = True
        whole, emptied = False, True
    alive = keep & (not emptied)
    if not whole:
        keep = keep | put_back(~keep, multiple)
    count = int((~keep).sum())
    if count == 0:
        return None
    output = torch.where(constant & read_at_all, value, 0)
    new_bias = _moved_into_bias(following, read, output)
    if whole:
        weight = following.weight.new_zeros(following.weight.shape[0], layer.weight.shape[1])
        for node in reversed((path.node, *path.between)):
            bypass(graph, node)
    else:
        kept = keep.nonzero().flatten()
        share = alive[kept].to(read)
        outputs, _, *kernel = following.weight.shape
        weight = (read[:, kept] * share.view(-1, 1)).reshape(outputs, -1, *kernel)
        _keep_units(graph, path, kept, share)
    set_module(graph, str(path.reader.target), with_weights(following, weight, new_bias))
    return Removed(str(path.node.target), count, whole)


def _any_along(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Whether any entry along these axes is not 0: as `any` along each, which takes four times as
    long."""
    nonzero: Tensor = torch.linalg.vector_norm(weight, 0, dim=axes)
    return nonzero > 0


def _keep_units(graph: fx.GraphModule, path: _Path, kept: Tensor, share: Tensor) -> None:
    """Leaves a layer these units alone, each times its `share` (kept,)."""
    layer = path.layer
    bias = None if layer.bias is None else layer.bias[kept] * share
    rows = layer.weight[kept]
    narrower = with_weights(layer, rows * share.view(-1, *[1] * (rows.dim() - 1)), bias)
    set_module(graph, str(path.node.target), narrower)


def _moved_into_bias(following: WeightLayer, read: Tensor, output: Tensor) -> Tensor | None:
    """The bias of a reader with what constant units give it: `read` (out, units, …), `output`
    (units)."""
    if not bool(output.any()):
        bias: Tensor | None = following.bias
        return bias
    moved = read.double().sum(2) @ output.double()  # (out of following)
    return moved if following.bias is None else moved + following.bias.double()


def _is_larger_without(layer: WeightLayer, following: WeightLayer) -> bool:
    """Whether a reader of the layer's inputs has more weights than the layer and its reader with
    one unit between them."""
    inputs, outputs = layer.weight.shape[1], following.weight.shape[0]
    return inputs * outputs > inputs * layer.weight.shape[0] + layer.weight.shape[0] * outputs


def _constants(
    weight: Tensor, bias: Tensor, *, relu: bool, input_nonnegative: bool
) -> tuple[Tensor, Tensor]:
    """Which units are constant, (units,) bool, and their output, (units,); `weight` (units, in),
    `bias` (units,)."""
    unfed = ~_any_along(weight, (1,))
    value = bias.clamp(min=0) if relu else bias
    if not (relu and input_nonnegative):
        return unfed, value
    silent = (weight <= 0).all(1) & (bias <= 0)
    return unfed | silent, torch.where(silent, 0, value)
