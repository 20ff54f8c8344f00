"""What a network does in training mode and not in evaluation mode."""

from collections.abc import Container
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.modes.arguments import (
    ATTENTION,
    DROPOUTS,
    Arguments,
    arguments_of,
    drops,
    is_known_function,
)
from slimfront.trainables.structure.attention_modules import ScaledDotProduct
from slimfront.trainables.structure.graph import submodule

_ATTENTION_DEFAULTS: Arguments = {
    "attn_mask": None,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
_LARGE = 10_000
"""Constants of more numbers are taken for different ones where their names are."""


@dataclass(frozen=True)
class _Step:
    """What a node of a graph does."""

    node: Node
    op: str
    target: object
    arguments: str
    """In words, with numbers of steps in the places of nodes."""

    def is_same(self, other: "_Step") -> bool:
        """Whether two graphs do the same in these steps."""
        if self.op != other.op:
            return False
        if self.target != other.target:
            return False
        return self.arguments == other.arguments

    def place(self) -> str:
        """The module whose code the node is, by name and kind; "" for the network's own code. The
        call of a module is code of the one that it is within."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        if self.op == "call_module":
            stack = stack[:-1]
        for path, kind in reversed(stack):
            kind_name = getattr(kind, "__name__", str(kind).rpartition(".")[2])
            if path and kind_name not in _CONTAINERS:
                return f"'{path}' ({kind_name})"
        return ""


def first_difference(
    evaluated: GraphModule, trained: GraphModule, followed: set[str], own: Container[str]
) -> str | None:
    """What does something else in training mode, dropout apart: a module's name and kind, "" for
    the network's own code.

    `followed` are the names of the modules that do the dropout, `own` those of the parameters and
    buffers of the network.
    """
    one = _steps(evaluated, set(), own)
    other = _steps(trained, followed, own)
    for mine, theirs in zip(one, other, strict=False):
        if not mine.is_same(theirs):
            # Of the call of a module and another operation, that is what was put in.
            return mine.place() if theirs.op == "call_module" else theirs.place()
    for rest in (one[len(other) :], other[len(one) :]):
        if rest:
            return rest[0].place()
    return None


def _steps(network: GraphModule, followed: set[str], own: Container[str]) -> list[_Step]:
    """What a graph does, step by step, with dropout left out."""
    numbers: dict[Node, str] = {}
    steps: list[_Step] = []

    def number(node: Node) -> Any:
        return _Number(numbers[node])

    for node in network.graph.nodes:
        if not node.users and node.op not in ("output", "placeholder"):
            continue
        module = _followed_module(network, node, followed)
        if _is_dropout(node, module):
            source = _input_of(node)
            numbers[node] = numbers[source]
            continue
        op = node.op
        target: object = node.target
        if op == "get_attr":
            target = _held(network, str(node.target), own)
        if isinstance(module, ScaledDotProduct):
            op = "call_function"
            target = ATTENTION
        arguments = _arguments(node, module)
        numbered = fx.node.map_arg(arguments, number)
        numbers[node] = str(len(steps))
        step = _Step(
            node=node,
            op=op,
            target=target,
            arguments=repr(numbered),
        )
        steps.append(step)
    return steps


def _held(network: GraphModule, name: str, own: Container[str]) -> object:
    """What a graph reads: a parameter or buffer of the network by its name, and a constant, which
    is named anew each time that a network is traced, by what it is."""
    found = attrgetter(name)(network)
    if name in own or not isinstance(found, Tensor) or found.layout != torch.strided:
        return name
    if found.numel() > _LARGE:
        return name
    return found.dtype, found.tolist()


def _input_of(node: Node) -> Node:
    """The node whose output a dropout passes on."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, Node)
    return source


def _followed_module(network: GraphModule, node: Node, followed: set[str]) -> nn.Module | None:
    """The module that stands for a call which goes by the mode; None for other nodes."""
    if node.op != "call_module":
        return None
    name = str(node.target)
    if name not in followed:
        return None
    return submodule(network, name)


def _is_dropout(node: Node, module: nn.Module | None) -> bool:
    """Whether a node passes on what it gets: dropout as a module, or a function that is off."""
    if module is not None:
        return not isinstance(module, ScaledDotProduct)
    if not is_known_function(node):
        return False
    if node.target not in DROPOUTS:
        return False
    return not drops(node)


def _arguments(node: Node, module: nn.Module | None) -> Any:
    """What a node is called with; attention as a function, without its dropout."""
    if isinstance(module, ScaledDotProduct):
        names = ("query", "key", "value", "attn_mask")
        by_place = zip(names, node.args, strict=False)
        inputs = dict(by_place)
        return _without_dropout(inputs | module.options())
    if not is_known_function(node):
        return node.args, dict(node.kwargs)
    given = arguments_of(node)
    if node.target is ATTENTION:
        return _without_dropout(given)
    return given


def _without_dropout(arguments: Arguments) -> Arguments:
    """All arguments of attention but for its dropout, in alphabetical order."""
    given = _ATTENTION_DEFAULTS | arguments
    given.pop("dropout_p", None)
    return dict(sorted(given.items()))


class _Number(str):
    """The number of a step, in the place of its node."""
