"""Which numbers in a network's code follow from sizes that change."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.slicing.stays import CannotSlice, Slices, has_tensors
from slimfront.trainables.structure.coupling.known import Known, mapped_known
from slimfront.trainables.structure.coupling.running import numbers_of
from slimfront.trainables.structure.coupling.walk import Walk


def follow_inputs(network: GraphModule, walk: Walk, inputs: Tensor) -> dict[Node, Any]:
    """The nodes that make other numbers for another number of inputs, or for inputs of other sizes,
    with what they make of three inputs; the walk was of two."""
    three = torch.arange(3) % len(inputs)
    for_three = numbers_of(network, inputs[three])
    found = {}
    for node, for_two in walk.known.items():
        if node.name not in for_three:
            continue
        if not _is_of_sizes(for_two):
            continue
        if for_three[node.name] != for_two or walk.varies(node):
            found[node] = for_three[node.name]
    return found


def changed_numbers(slices: Slices) -> dict[Node, Any]:
    """The nodes that would make other numbers than they made, from the sizes that change, with
    those."""
    new: dict[Node, Any] = {}
    changed = {}
    for node in slices.network.graph.nodes:
        before = slices.known(node)
        new[node] = _made(slices, node, new)
        if not _is_call(node):
            continue
        if not _is_of_sizes(before):
            continue
        if new[node] != before:
            changed[node] = new[node]
    return changed


def in_proportion(slices: Slices, node: Node, size: Node, made: int, wanted: int) -> Node:
    """A node before this one that makes a size that is `wanted` of two inputs, where `size`, which
    follows from their number or sizes, makes another: a factor of it was written into the code.

    Raises:
        CannotSlice: if the size is not proportional to the number of inputs.
    """
    of_three = slices.by_inputs[size]
    of_two = slices.known(size)
    follows_number = of_three != of_two
    if follows_number and 2 * of_three != 3 * of_two:
        raise CannotSlice(node)
    common = math.gcd(made, wanted)
    graph = slices.network.graph
    with graph.inserting_before(node):
        several = graph.call_function(operator.mul, (size, wanted // common))
        new = graph.call_function(operator.floordiv, (several, made // common))
    slices.walk.known[new] = wanted
    return new


def item_of(slices: Slices, node: Node, sizes: Node, place: int) -> Node | int:
    """One of several sizes: a node before this one where it follows from the inputs, or a
    number."""
    known = slices.known(sizes)[place]
    of_three = slices.by_inputs.get(sizes, slices.known(sizes))[place]
    elsewhere = [there[sizes][place] for there in slices.walk.elsewhere]
    if all(other == known for other in (of_three, *elsewhere)):
        return int(known)
    graph = slices.network.graph
    with graph.inserting_before(node):
        item = graph.call_function(operator.getitem, (sizes, place))
    slices.walk.known[item] = known
    slices.by_inputs[item] = of_three
    return item


def _made(slices: Slices, node: Node, new: dict[Node, Any]) -> Any:
    """What a node makes of the `new` values of other nodes: tensors without memory, of the shapes
    that they will have, or numbers."""

    def of_new_shape(known: Known) -> Tensor:
        shape = slices.shape(known)
        return torch.empty(shape, device="meta")

    value = slices.known(node)
    is_computed_number = _is_call(node) and not has_tensors(value)
    if not is_computed_number:
        return mapped_known(value, of_new_shape)
    given = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(given, new.__getitem__)
    try:
        return slices.walk.called(node, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return value  # it stays as it is, and the outputs are compared in the end


def _is_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method")


def _is_of_sizes(value: Any) -> bool:
    """Whether a value is a number, or a tuple of numbers: types and devices follow from no size."""
    if isinstance(value, int | float):
        return True
    if not isinstance(value, tuple | list):
        return False
    return all(_is_of_sizes(item) for item in value)
