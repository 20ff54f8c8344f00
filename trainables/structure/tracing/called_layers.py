"""Operations of torch's own library as calls of the layers that they come from: those with its
parameters and its settings."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Node

from slimfront.trainables.structure.tracing.encoders import plain_kind
from slimfront.trainables.torch_internals import function_name

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv1d": (nn.Conv1d,),
    "conv2d": (nn.Conv2d,),
    "conv3d": (nn.Conv3d,),
    "conv_transpose1d": (nn.ConvTranspose1d,),
    "conv_transpose2d": (nn.ConvTranspose2d,),
    "conv_transpose3d": (nn.ConvTranspose3d,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "layer_norm": (nn.LayerNorm,),
    "rms_norm": (nn.RMSNorm,),
    "group_norm": (nn.GroupNorm,),
    "instance_norm": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "embedding": (nn.Embedding,),
    "prelu": (nn.PReLU,),
    "rnn_tanh_cell": (nn.RNNCell,),
    "rnn_relu_cell": (nn.RNNCell,),
    "gru_cell": (nn.GRUCell,),
    "lstm_cell": (nn.LSTMCell,),
    "rnn_tanh": (nn.RNN,),
    "rnn_relu": (nn.RNN,),
    "gru": (nn.GRU,),
    "lstm": (nn.LSTM,),
}
"""Which kinds of modules do one operation with parameters of theirs."""
_CONV_SETTINGS = (("stride", 3), ("padding", 4), ("dilation", 5), ("groups", 6))
_TRANSPOSED_SETTINGS = (
    *(("stride", 3), ("padding", 4), ("output_padding", 5)),
    *(("groups", 6), ("dilation", 7)),
)
_SETTINGS: dict[str, tuple[tuple[str, int], ...]] = {
    **{f"conv{n}d": _CONV_SETTINGS for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED_SETTINGS for n in (1, 2, 3)},
    "layer_norm": (("normalized_shape", 1), ("eps", 4)),
    "rms_norm": (("normalized_shape", 1), ("eps", 3)),
    "group_norm": (("num_groups", 1), ("eps", 4)),
    "batch_norm": (("eps", 7),),
    "instance_norm": (("eps", 7),),
}
"""Where the settings of a layer stand among the arguments of its operation."""
_DEFAULTS: dict[str, Any] = {
    **{"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0},
    "eps": 1e-5,
}


_RECURRENT_SETTINGS = (
    *("bias", "num_layers", "dropout", "training", "bidirectional"),
    "batch_first",
)
"""The settings of a recurrent layer, in the order in which its operation is given them, behind its
input, state and parameters."""


def inputs_of(node: Node, args: Any) -> tuple[Any, ...]:
    """The inputs of a layer among the arguments of its operation in a graph."""
    operation = function_name(node)
    if operation == "embedding":
        return (args[1],)
    if not _is_recurrent(operation):
        return (args[0],)
    state = args[1]
    if isinstance(state, list | tuple):
        state = tuple(state)
    return (args[0], state)


def _is_recurrent(operation: str) -> bool:
    return operation.startswith(("rnn_", "gru", "lstm"))


def layer_of(node: Node, args: Any, held: dict[str, Any]) -> str | None:
    """The module which does an operation: one of that kind, with these parameters and settings;
    None if there is none.

    Args:
        args: the arguments in the new graph.
        held: modules by name; one whose own code calls the operation is replaced by a plain one.
    """
    operation = function_name(node)
    kinds = _LAYERS.get(operation)
    if kinds is None:
        return None
    names = []
    for source in _other_sources(args, inputs_of(node, args)):
        if source.op != "get_attr":
            return None
        names.append(str(source.target))
    owners = set()
    for name in names:
        owner, _, _ = name.rpartition(".")
        owners.add(owner)
    if len(owners) != 1:
        return None
    (owner,) = owners
    module = held.get(owner)
    if not isinstance(module, kinds):
        return None
    if not _has_parameters(module, names):
        return None
    if not _has_settings(module, operation, args):
        return None
    if _is_recurrent(operation) and not _is_of_mode(module, operation, args):
        return None
    if plain_kind(module) not in kinds:  # its own code calls the operation, with its parameters
        held[owner] = _as_plain(module, kinds)
    return owner


def _other_sources(args: Any, inputs: tuple[Any, ...]) -> Iterator[Node]:
    """The nodes among the arguments of an operation, but for its inputs."""
    for argument in args:
        items = argument
        if not isinstance(argument, list | tuple):
            items = [argument]
        if any(argument is one or tuple(items) == one for one in inputs):
            continue
        for item in items:
            if isinstance(item, Node):
                yield item


def _is_of_mode(module: Any, operation: str, args: Any) -> bool:
    """Whether a recurrent layer or cell does an operation of this name, with these settings."""
    nonlinearity = getattr(module, "nonlinearity", None)
    if nonlinearity is not None and f"_{nonlinearity}" not in operation:
        return False
    if operation.endswith("_cell"):
        return True
    given = dict(zip(_RECURRENT_SETTINGS, args[3:], strict=False))
    given.pop("dropout", None)
    given.pop("training", None)
    return all(getattr(module, setting) == value for setting, value in given.items())


def _as_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """A module of the kind of torch.nn that a module is a subclass of, with the same parameters."""
    plain = copy.copy(module)
    for kind in kinds:
        if isinstance(module, kind):
            plain.__class__ = kind
            break
    return plain


def _has_parameters(module: nn.Module, names: list[str]) -> bool:
    """Whether a module has all of these parameters and buffers, and no others."""
    own = set()
    parameters = module.named_parameters(recurse=False)
    buffers = module.named_buffers(recurse=False)
    for leaf, tensor in [*parameters, *buffers]:
        if tensor.dim() > 0:
            own.add(leaf)
    leaves = set()
    for name in names:
        _, _, leaf = name.rpartition(".")
        leaves.add(leaf)
    return own == leaves


def _has_settings(module: nn.Module, operation: str, args: Any) -> bool:
    """Whether a module has the settings of an operation."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    for setting, place in _SETTINGS.get(operation, ()):
        given = _DEFAULTS.get(setting)
        if len(args) > place:
            given = args[place]
        own = getattr(module, setting)
        if not _equal(own, given):
            return False
    return True


def _equal(own: Any, given: Any) -> bool:
    """Whether two settings are the same: one number stands for as many as there are axes."""
    if own is None or given is None:
        return own is given
    is_word = isinstance(own, str) or isinstance(given, str)
    if is_word:
        return bool(own == given)
    ones = _as_list(own)
    others = _as_list(given)
    if len(ones) == 1 or len(others) == 1:
        different = {*ones, *others}
        return len(different) == 1
    return ones == others


def _as_list(setting: Any) -> list[Any]:
    if isinstance(setting, tuple | list):
        return list(setting)
    return [setting]
