"""The arguments of torch's functions by name, and whether a dropout among them drops anything."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from slimfront.trainables.structure.graph import Conv

Arguments = dict[str, Any]
"""What a function is called with, by name."""

DROPOUTS: dict[object, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    torch.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    torch.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
CONVS: dict[object, type[Conv]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
ATTENTION = F.scaled_dot_product_attention
_ON_BY_DEFAULT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_NAMES: dict[object, tuple[str, ...]] = {
    **dict.fromkeys(DROPOUTS, ("input", "p", "training", "inplace")),
    torch.dropout: ("input", "p", "train"),
    torch.alpha_dropout: ("input", "p", "train"),
    torch.feature_alpha_dropout: ("input", "p", "train"),
    ATTENTION: (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ),
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(CONVS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.batch_norm: (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ),
}


def is_known_function(node: Node) -> bool:
    """Whether a node calls a function whose arguments have names here."""
    if node.op != "call_function":
        return False
    return node.target in _NAMES


def arguments_of(node: Node) -> Arguments:
    """The arguments of a known function."""
    names = _NAMES[node.target]
    pairs = zip(names, node.args, strict=False)
    by_place = dict(pairs)
    return by_place | dict(node.kwargs)


def drops(node: Node) -> bool:
    """Whether a function of dropout is on."""
    given = arguments_of(node)
    if given.get("p", 0.5) == 0:
        return False
    is_on: Any = node.target in _ON_BY_DEFAULT
    is_on = given.get("train", is_on)
    is_on = given.get("training", is_on)
    return bool(is_on)
