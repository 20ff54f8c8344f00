"""Dropout that functions do in a network traced in training mode, done by modules, which follow the
mode that they are in."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.modes.arguments import ATTENTION, DROPOUTS, arguments_of, drops
from slimfront.trainables.compaction.modes.replacing import add_module, replace_call
from slimfront.trainables.structure.attention_modules import ScaledDotProduct


@dataclass(frozen=True)
class _Following:
    """A module that follows the mode that it is in, and what it is called with."""

    module: nn.Module
    inputs: tuple[Any, ...]


def follow_mode(network: GraphModule) -> set[str]:
    """Has modules do the dropout that functions do in a network traced in training mode, in place;
    the names of the modules."""
    made: set[str] = set()
    for node in list(network.graph.nodes):
        following = _following(node)
        if following is None:
            continue
        name = add_module(network, node.name, following.module)
        replace_call(network, node, name, following.inputs)
        made.add(name)
    if made:
        network.recompile()
    return made


def _following(node: Node) -> _Following | None:
    """The module that does a function's dropout; None where the function does none."""
    if node.op != "call_function":
        return None
    if node.target is ATTENTION:
        return _attention(node)
    if node.target in DROPOUTS:
        return _plain_dropout(node)
    return None


def _plain_dropout(node: Node) -> _Following | None:
    given = arguments_of(node)
    share = given.get("p", 0.5)
    if not isinstance(share, float | int):
        return None
    if not drops(node):
        return None
    dropout = DROPOUTS[node.target](share)
    return _Following(dropout, (given["input"],))


def _attention(node: Node) -> _Following | None:
    given = arguments_of(node)
    dropout = given.get("dropout_p", 0.0)
    causal = given.get("is_causal", False)
    scale = given.get("scale")
    grouped = given.get("enable_gqa", False)
    if not isinstance(dropout, float | int):
        return None
    if dropout == 0:
        return None
    if not isinstance(causal, bool):
        return None
    if not isinstance(scale, float | None):
        return None
    inputs = [
        given["query"],
        given["key"],
        given["value"],
    ]
    mask = given.get("attn_mask")
    if mask is not None:
        inputs.append(mask)
    attention = ScaledDotProduct(
        dropout=float(dropout),
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(grouped),
    )
    return _Following(attention, tuple(inputs))
