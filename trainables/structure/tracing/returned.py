"""What a graph returns, in a form that torch.fx can write as code."""

from collections import OrderedDict
from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict

_PLAIN = (dict, OrderedDict, immutable_dict)
"""Mappings that code can write as they are, the last one being how a graph holds them."""


def writable(graph: fx.Graph, returned: Any, *, within: bool = False) -> Any:
    """What a graph returns, with a call in the place of each mapping of a class of its own, such as
    the outputs of transformers, and of each named tuple `within` a mapping: code would name its
    class there, which it does not know."""
    if isinstance(returned, dict):
        named = {key: writable(graph, value, within=True) for key, value in returned.items()}
        if type(returned) in _PLAIN:
            return named
        return graph.call_function(type(returned), (), named)
    if not isinstance(returned, list | tuple):
        return returned
    items = [writable(graph, item, within=within) for item in returned]
    is_named = hasattr(returned, "_fields")
    if is_named and within:
        return graph.call_function(type(returned), tuple(items))
    if is_named:
        return type(returned)(*items)
    return tuple(items) if isinstance(returned, tuple) else items


def make_writable(graph: fx.Graph) -> None:
    """Has a graph return what can be written, in place."""
    for node in list(graph.nodes):
        if node.op == "output":
            with graph.inserting_before(node):
                node.args = (writable(graph, node.args[0]),)
