"""A network in float64, in which compaction judges what it does, and back in its own types."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.inputs import in_float64
from slimfront.trainables.structure.agreement import outputs
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import arguments

_WIDENED = "widened"
"""Marks a node that was told to compute in float64; what it was told before."""


def in_float64_where_it_can(
    original: GraphModule, inputs: Tensor
) -> tuple[GraphModule, Tensor, bool]:
    """A copy of the network and its inputs, in float64, and true; in their own type, and false, if
    its code or the device allows no other."""
    try:
        exact = copied(original).eval().double()
        _widen(exact)
        few = in_float64(inputs[:2])
        outputs(exact, few)
        return exact, in_float64(inputs), True
    except (RuntimeError, TypeError, ValueError):
        return copied(original).eval(), inputs, False


def type_of(network: nn.Module) -> torch.dtype:
    """The type that a network computes in."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()


def restore_types(network: GraphModule, original: GraphModule) -> None:
    """Gives parameters and buffers the types that they had; those that are new, that of the first
    parameter."""
    types = {}
    for name, tensor in _tensors(original):
        types[name] = tensor.dtype
    floating = (dtype for dtype in types.values() if dtype.is_floating_point)
    first = next(floating, torch.get_default_dtype())
    network.zero_grad()
    _narrow(network)
    for prefix, module in network.named_modules():
        for leaf, tensor in _tensors(module, recurse=False):
            if not tensor.is_floating_point():
                continue
            name = f"{prefix}.{leaf}".lstrip(".")
            dtype = types.get(name, first)
            tensor.data = tensor.data.to(dtype)


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [
        *module.named_parameters(recurse=recurse),
        *module.named_buffers(recurse=recurse),
    ]


def _widen(network: GraphModule) -> None:
    """Has casts to float32 in a network's code be casts to float64."""
    for node in network.graph.nodes:
        is_method = node.op == "call_method"
        if is_method and node.target == "float":
            node.meta[_WIDENED] = "float"
            node.target = "double"
        elif _names_type(node, torch.float32):
            node.meta[_WIDENED] = torch.float32
            _rename_types(node, before=torch.float32, after=torch.float64)
    network.recompile()


def _narrow(network: GraphModule) -> None:
    """Takes that back."""
    for node in network.graph.nodes:
        before = node.meta.pop(_WIDENED, None)
        if before == "float":
            node.target = before
        elif before is not None:
            _rename_types(node, before=torch.float64, after=before)
    network.recompile()


def _names_type(node: Node, dtype: torch.dtype) -> bool:
    return any(value is dtype for value in arguments(node))


def _rename_types(node: Node, before: torch.dtype, after: torch.dtype) -> None:
    def renamed(value: Any) -> Any:
        if value is before:
            return after
        return value

    args = [renamed(value) for value in node.args]
    node.args = tuple(args)
    kwargs = {}
    for name, value in node.kwargs.items():
        kwargs[name] = renamed(value)
    node.kwargs = kwargs
