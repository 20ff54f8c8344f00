"""What an exported network computes of constants alone, such as the masks of shifted windows:
computed once, and held as constants.

Code writes such tensors in place, part by part, which no graph shows; to have torch write all of a
network's operations anew without writing in place takes minutes where a network is large.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from slimfront.trainables.torch_internals import repeats_itself, writes_in_place

_NAME = "_computed_constant"
_OF_A_TYPE = ("aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default")
"""Operations that read no more of their tensor than its type and device."""

Read = tuple[Node, Node]
"""A node that reads another."""


class ConstantRun:
    """The constants of an exported network, computed in the order of its graph.

    It is as if the network ran up to there: a constant is what it was when it was read, whatever is
    written to it later.
    """

    def __init__(self, network: GraphModule, given: Mapping[Node, Tensor]) -> None:
        """`given` are the constants that are among the network's inputs."""
        self.network = network
        self.given = given
        self.values: dict[Node, Any] = {}
        """What each constant is by now."""
        for node, value in given.items():
            self.values[node] = value.detach().cpu()
        self.read: dict[Read, Tensor] = {}
        """What each constant was when a node that is none read it."""
        self.is_whole = all(self._takes(node) for node in network.graph.nodes)
        """Whether all of them were computed: not where something else is written to one."""

    def not_constant(self) -> list[Node]:
        """The nodes that stay, in order."""
        return [node for node in self.network.graph.nodes if node not in self.values]

    def _takes(self, node: Node) -> bool:
        """Computes a node, if it is a constant; False if it writes to one without being one."""
        if node in self.given:
            return True
        if self._is_constant(node):
            self.values[node] = self._computed(node)
            return True
        for argument in node.all_input_nodes:
            if argument not in self.values:
                continue
            value = self.values[argument]
            if not isinstance(value, Tensor):
                return False
            device = argument.meta["val"].device
            self.read[node, argument] = value.to(device, copy=True)
        written = node.args[0] if node.args else None
        return not (writes_in_place(node) and written in self.values)

    def _is_constant(self, node: Node) -> bool:
        if node.op != "call_function" or not repeats_itself(node):
            return False
        arguments = set(node.all_input_nodes)
        if str(node.target) in _OF_A_TYPE:
            # Sizes that depend on the batch are arguments too.
            arguments.discard(self._like(node))
        return all(argument in self.values for argument in arguments)

    def _like(self, node: Node) -> Node:
        like = node.args[0]
        assert isinstance(like, Node)
        return like

    @torch.no_grad()
    def _computed(self, node: Node) -> Any:
        values: dict[Node, Any] = dict(self.values)
        if str(node.target) in _OF_A_TYPE:
            like = self._like(node)
            values[like] = torch.empty(0, dtype=like.meta["val"].dtype)
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        return node.target(*args, **{**kwargs, **_on_cpu(kwargs)})

    def apply(self) -> None:
        """Has what is no constant read what was computed, and takes the rest out."""
        graph = self.network.graph
        held: list[Tensor] = []
        for (node, argument), value in self.read.items():
            name = f"{_NAME}_{_place(value, held)}"
            self.network.register_buffer(name, value)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            node.replace_input_with(argument, constant)
        for node in reversed(list(self.values)):
            if node not in self.given:
                graph.erase_node(node)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where constants are computed; they are held where the network is."""
    if kwargs.get("device") is None:
        return {}
    return {"device": torch.device("cpu")}


def _place(value: Tensor, held: list[Tensor]) -> int:
    """The place of an equal tensor among those held, where it is put if there is none."""
    for place, other in enumerate(held):
        same_kind = other.shape == value.shape and other.dtype == value.dtype
        if same_kind and torch.equal(other, value):
            return place
    held.append(value)
    return len(held) - 1
