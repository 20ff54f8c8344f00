"""Runs of layers that become one where the activations between them go: an expansion, a depthwise
convolution and a projection become one convolution (Fu et al. 2022, arXiv 2206.00843)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import (
    bypass,
    count_nonzeros,
    set_module,
    with_weights,
)
from slimfront.trainables.compaction.merging.products import (
    entries_of_product,
    fit,
    gives_zero_outside,
    plus,
    product,
    sizes,
    times,
)
from slimfront.trainables.structure.graph import (
    Conv,
    Layer,
    WeightLayer,
    calls,
    layers_of,
    only_user,
)

_UNCHANGED: tuple[object, ...] = (nn.Identity, nn.Dropout)
"""What merging sees through."""

_LONGEST = 4
"""So many layers become one at most."""


IsActivation = Callable[[GraphModule, Node], bool]
ShapesByNode = Mapping[Node, object]


@dataclass(frozen=True)
class Run:
    """Layers, each of which feeds the next alone, through an activation or nothing."""

    layers: tuple[Layer, ...]
    activations: tuple[Node, ...]
    moves_padding: bool
    """Whether they are one only if all padding stands in front of the first."""

    @property
    def last(self) -> Layer:
        """The layer that stays, and computes what all of them do."""
        return self.layers[-1]


def runs(
    graph: GraphModule,
    shapes: ShapesByNode,
    is_activation: IsActivation,
) -> Iterator[Run]:
    """The runs whose layers, as one, have no more weights, no more that are not zero, and no more
    multiplications than they have now, in order of execution; each has an activation that goes.

    Args:
        shapes: of what each node makes, as `shapes_of` gives them.
        is_activation: whether a node works on each number alone.
    """
    layers = {layer.node: layer for layer in layers_of(graph, grouped=True)}
    for first in layers.values():
        run = Run((first,), (), moves_padding=False)
        while len(run.layers) < _LONGEST:
            longer = _longer(graph, run, layers, is_activation)
            if longer is None:
                break
            run = longer
            if run.activations and _pays(run, shapes):
                yield run


def chain(graph: GraphModule, shapes: Callable[[], ShapesByNode]) -> Run | None:
    """The first run of layers with nothing between them that is exactly one layer, and costs no
    more as one; None if there is none. Two that merge by themselves are no such run.

    Args:
        shapes: gives them as `runs` takes them; asked only where there is something to judge.
    """
    layers = {layer.node: layer for layer in layers_of(graph, grouped=True)}
    for first in layers.values():
        run = Run((first,), (), moves_padding=False)
        while len(run.layers) < _LONGEST:
            longer = _longer(graph, run, layers, _nothing_is_an_activation)
            if longer is None or longer.moves_padding:
                break
            run = longer
            if len(run.layers) > 2 and _pays(run, shapes()):
                return run
    return None


def _nothing_is_an_activation(_graph: GraphModule, _node: Node) -> bool:
    return False


def _longer(
    graph: GraphModule,
    run: Run,
    layers: Mapping[Node, Layer],
    is_activation: IsActivation,
) -> Run | None:
    """The run with the layer behind it; None if there is none that it feeds alone."""
    reader = only_user(run.last.last)
    activations = run.activations
    if reader is not None and is_activation(graph, reader):
        activations = (*activations, reader)
        reader = only_user(reader)
    while reader is not None and calls(graph, reader, _UNCHANGED):
        reader = only_user(reader)
    if reader is None or reader not in layers:
        return None
    following = layers[reader]
    if not fit(run.last.layer, following.layer):
        return None
    layers_of_run = (*run.layers, following)
    inexact = run.moves_padding or _pads_what_is_not_zero(run, following)
    return Run(layers_of_run, activations, inexact)


def _pads_what_is_not_zero(run: Run, following: Layer) -> bool:
    """Whether the zeros that a layer pads by stand where what feeds it would not give zero."""
    if isinstance(following.layer, nn.Linear):
        return False
    if not any(following.layer.padding):
        return False
    for layer in run.layers:
        if layer.norm is not None:
            return True
        if not gives_zero_outside(layer.layer):
            return True
    return False


@torch.no_grad()
def product_of(layers: Sequence[Layer], *, moves_padding: bool) -> WeightLayer | None:
    """All layers as one, without the batch norm of the last; None where no single layer does
    that."""
    first, *between, last = layers
    combined = folded(first)
    for layer in between:
        own = folded(layer)
        further = product(combined, own, moves_padding=moves_padding)
        if further is None:
            return None
        combined = further
    return product(combined, last.layer, moves_padding=moves_padding)


def folded(layer: Layer) -> WeightLayer:
    """A layer with its batch norm in its weights."""
    own = layer.layer
    if layer.norm is None:
        return own
    weight, bias = layer.folded()
    made = with_weights(own, weight, bias)
    if isinstance(made, Conv) and isinstance(own, Conv):
        made.groups = own.groups
        made.in_channels = own.in_channels
    return made


def move_padding(run: Run) -> None:
    """Has the first layer pad for all of them, in place: what changes is the border of images, and
    the run is one layer exactly then."""
    if not run.moves_padding:
        return
    convolutions = [layer.layer for layer in run.layers if isinstance(layer.layer, Conv)]
    first = convolutions[0]
    padding = sizes(first.padding)
    stride = first.stride
    for following in convolutions[1:]:
        in_front = times(stride, sizes(following.padding))
        padding = plus(padding, in_front)
        stride = times(stride, following.stride)
        following.padding = (0,) * len(padding)
    first.padding = padding


def merge_run(graph: GraphModule, run: Run) -> None:
    """Makes one layer of a run whose activations are gone, in place of its last."""
    combined = product_of(run.layers, moves_padding=run.moves_padding)
    assert combined is not None
    *gone, last = run.layers
    set_module(graph, last.name, combined)
    for layer in gone:
        if layer.last is not layer.node:
            bypass(graph, layer.last)
        bypass(graph, layer.node)


def _pays(run: Run, shapes: ShapesByNode) -> bool:
    """Whether one layer costs no more than the run."""
    layers = [layer.layer for layer in run.layers]
    entries = entries_of_product(layers)
    entries_apart = 0
    work_apart = 0
    for layer in run.layers:
        own = layer.layer.weight.numel()
        made = shapes[layer.node]
        positions = _positions(layer, made)
        entries_apart += own
        work_apart += own * positions
    if entries > entries_apart:
        return False
    # The positions of the last layer are those of all as one.
    work = entries * positions
    if work > work_apart:
        return False
    combined = product_of(run.layers, moves_padding=run.moves_padding)
    assert combined is not None
    nonzero_apart = sum(map(count_nonzeros, layers))
    biases = len(combined.weight)
    nonzero = count_nonzeros(combined)
    return nonzero <= nonzero_apart + biases


def _positions(layer: Layer, made: object) -> int:
    """For how many positions of its output a layer multiplies its weights."""
    assert isinstance(made, tuple)
    shape: Sequence[int] = made[0]
    positions = shape[2:]
    if isinstance(layer.layer, nn.Linear):
        positions = shape[:-1]
    return math.prod(positions)
