"""A compact network as plain data and tensors, so that a checkpoint loads with `weights_only=True`
and no pickled code."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.structure.attention import Attention, ScaledDotProduct
from slimfront.trainables.structure.graph import Conv

ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

FORMAT = 2

_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_RECURRENT = (
    *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
    "bidirectional",
)
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

# The modules that may appear in a compact network, with the constructor arguments that rebuild
# them.
_MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "linear": (nn.Linear, ("in_features", "out_features")),
    **{f"conv{n}d": (kind, _CONV) for n, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)},
    **{
        f"batch_norm{n}d": (kind, _NORM)
        for n, kind in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)
    },
    **{
        f"conv_transpose{n}d": (kind, (*_CONV, "output_padding"))
        for n, kind in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)
    },
    **{
        f"instance_norm{n}d": (kind, _NORM)
        for n, kind in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1)
    },
    "layer_norm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "rms_norm": (nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "group_norm": (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "local_response_norm": (nn.LocalResponseNorm, ("size", "alpha", "beta", "k")),
    "gru": (nn.GRU, _RECURRENT),
    "lstm": (nn.LSTM, (*_RECURRENT, "proj_size")),
    "rnn": (nn.RNN, (*_RECURRENT, "nonlinearity")),
    "bilinear": (nn.Bilinear, ("in1_features", "in2_features", "out_features")),
    "embedding": (nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx")),
    "attention": (Attention, ("heads", "batch_first", "dropout")),
    "softmax": (nn.Softmax, ("dim",)),
    "log_softmax": (nn.LogSoftmax, ("dim",)),
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)),
    "silu": (nn.SiLU, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "gelu": (nn.GELU, ("approximate",)),
    "sigmoid": (nn.Sigmoid, ()),
    "logsigmoid": (nn.LogSigmoid, ()),
    "prelu": (nn.PReLU, ("num_parameters",)),
    "selu": (nn.SELU, ()),
    "celu": (nn.CELU, ("alpha",)),
    "mish": (nn.Mish, ()),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softsign": (nn.Softsign, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "glu": (nn.GLU, ("dim",)),
    "threshold": (nn.Threshold, ("threshold", "value")),
    "upsample": (nn.Upsample, ("size", "scale_factor", "mode", "align_corners")),
    "pixel_shuffle": (nn.PixelShuffle, ("upscale_factor",)),
    "pixel_unshuffle": (nn.PixelUnshuffle, ("downscale_factor",)),
    "channel_shuffle": (nn.ChannelShuffle, ("groups",)),
    "unflatten": (nn.Unflatten, ("dim", "unflattened_size")),
    "zero_pad2d": (nn.ZeroPad2d, ("padding",)),
    "reflection_pad2d": (nn.ReflectionPad2d, ("padding",)),
    "replication_pad2d": (nn.ReplicationPad2d, ("padding",)),
    "tanh": (nn.Tanh, ()),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "identity": (nn.Identity, ()),
    "dropout": (nn.Dropout, ("p",)),
    "dropout1d": (nn.Dropout1d, ("p",)),
    "dropout2d": (nn.Dropout2d, ("p",)),
    "dropout3d": (nn.Dropout3d, ("p",)),
    "alpha_dropout": (nn.AlphaDropout, ("p",)),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout, ("p",)),
    "scaled_dot_product": (ScaledDotProduct, ("dropout", "is_causal", "scale", "enable_gqa")),
    **{
        f"max_pool{n}d": (kind, _MAX)
        for n, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)
    },
    "avg_pool1d": (nn.AvgPool1d, _AVERAGE),
    "avg_pool2d": (nn.AvgPool2d, (*_AVERAGE, "divisor_override")),
    "avg_pool3d": (nn.AvgPool3d, (*_AVERAGE, "divisor_override")),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, ("output_size",)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ("output_size",)),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, ("output_size",)),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, ("output_size", "return_indices")),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d, ("output_size", "return_indices")),
}
_TENSORS = ("parameter", "buffer")
_KINDS = {cls: kind for kind, (cls, _) in _MODULES.items()}


def _shape(x: torch.Tensor) -> torch.Size:
    """What `x.shape` is traced as: attributes that are not among these stay out of stored
    networks."""
    return x.shape


def _dtype(x: torch.Tensor) -> torch.dtype:
    """What `x.dtype` is traced as."""
    return x.dtype


def _device(x: torch.Tensor) -> torch.device:
    """What `x.device` is traced as."""
    return x.device


_ATTRIBUTES = {"shape": _shape, "dtype": _dtype, "device": _device}


_OPERATORS = (
    *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv", "matmul"),
    *("neg", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "invert"),
    *("mod", "abs"),
)
_OF_TORCH = (
    *("add", "sub", "mul", "div", "matmul", "bmm", "einsum", "exp", "sqrt", "rsqrt", "abs"),
    *("relu", "sigmoid", "tanh", "softmax", "log_softmax", "clamp", "mean", "sum", "amax"),
    *("cat", "stack", "split", "chunk", "unbind", "flatten", "reshape", "permute", "transpose"),
    *("unsqueeze", "squeeze", "roll", "flip", "where", "arange", "zeros", "ones", "full"),
    *("zeros_like", "ones_like", "full_like", "cumsum", "amin", "max", "min", "argmax", "norm"),
    *("maximum", "minimum", "square", "reciprocal", "log", "sin", "cos", "erf", "round", "floor"),
    *(
        "logical_and",
        "logical_or",
        "logical_not",
        "masked_fill",
        "gather",
        "narrow",
        "index_select",
    ),
    *("var", "std", "prod", "any", "all", "tril", "triu", "outer", "baddbmm", "addmm"),
    *("broadcast_to", "tile", "repeat_interleave", "movedim", "logsumexp", "eq", "ne", "lt", "gt"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "selu", "pow"),
)
_FUNCTIONAL = (
    *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardtanh"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "softmax", "log_softmax", "dropout"),
    *(f"{pool}{n}d" for pool in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)),
    *(f"adaptive_max_pool{n}d" for n in (1, 2, 3)),
    *("pad", "interpolate", "pixel_shuffle", "pixel_unshuffle", "normalize", "layer_norm"),
    *("selu", "celu", "glu", "logsigmoid", "softsign", "one_hot", "embedding", "linear", "conv2d"),
    "scaled_dot_product_attention",
)
_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _OF_TORCH},
    **{name: getattr(F, name) for name in _FUNCTIONAL},
    **_ATTRIBUTES,
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_METHODS = (
    *("relu", "relu_", "sigmoid", "tanh", "softmax", "log_softmax", "clamp", "exp", "sqrt"),
    *("rsqrt", "abs", "pow", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"),
    *("matmul", "bmm", "mean", "sum", "amax", "chunk", "split", "unbind", "size", "dim"),
    *("flatten", "unflatten", "view", "reshape", "contiguous", "transpose", "permute"),
    *("unsqueeze", "squeeze", "expand", "repeat", "roll", "flip", "to", "type_as", "float"),
    *("double", "half", "long", "int", "bool", "masked_fill", "masked_fill_", "gather", "eq", "ne"),
    *("lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "cumsum", "max", "min"),
    *("amin", "argmax", "norm", "square", "log", "reciprocal", "var", "std", "prod", "any", "all"),
    *("expand_as", "view_as", "reshape_as", "narrow", "index_select", "clamp_", "clamp_min"),
    *("clamp_max", "new_zeros", "new_ones", "new_full", "t", "movedim", "swapaxes", "neg", "sin"),
    *("cos", "floor", "round", "tril", "triu", "repeat_interleave", "type", "clone", "detach"),
)


def serialise(network: fx.GraphModule) -> dict[str, Any]:
    """A traced network as a dictionary of plain data and tensors.

    Raises:
        ValueError: if the network holds a module or an operation that is not in the tables above.
    """
    modules: dict[str, Any] = {}
    kept: dict[int, str] = {}
    nodes = []
    for node in network.graph.nodes:
        target, values = _operation(node)
        if node.op == "call_module" and target not in modules:
            modules[target] = _module_to_plain(network.get_submodule(target), target)
            _tie(modules[target], network.get_submodule(target), target, kept)
        elif node.op == "get_attr":
            modules[target] = _tensor_to_plain(network, target)
        arguments = [_argument_to_plain(value) for value in values]
        keywords = {key: _argument_to_plain(value) for key, value in node.kwargs.items()}
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": arguments,
                "kwargs": keywords,
            }
        )
    return {"format": FORMAT, "modules": modules, "nodes": nodes}


def _operation(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of what a node does, and what it does it with.

    Raises:
        ValueError: if it is not in the tables above.
    """
    target = str(node.target)
    if node.op == "call_function":
        if node.target is getattr and node.args[1] in _ATTRIBUTES:
            return str(node.args[1]), node.args[:1]
        if node.target in _FUNCTION_NAMES:
            return _FUNCTION_NAMES[node.target], node.args
        raise ValueError(f"cannot store the operation '{node.name}' ({target}) as plain data")
    if node.op == "call_method" and target not in _METHODS:
        raise ValueError(f"cannot store the operation '{node.name}' (.{target}) as plain data")
    if node.op not in ("call_module", "get_attr", "call_method", "placeholder", "output"):
        raise ValueError(f"cannot store '{node.name}' ({node.op} {target}) as plain data")
    return target, node.args


def deserialise(plain: dict[str, Any]) -> fx.GraphModule:
    """The network that `serialise` stored, in evaluation mode on the CPU, with bit-identical
    weights.

    Raises:
        ValueError: if the data is of another format.
    """
    if plain.get("format") != FORMAT:
        raise ValueError(
            f"this network is stored in format {plain.get('format')}, and this version reads "
            f"format {FORMAT}"
        )
    check_plain(plain)
    root = nn.Module()
    for name, stored in plain["modules"].items():
        parent, _, leaf = name.rpartition(".")
        if stored["kind"] in _TENSORS:
            _tensor_from_plain(_submodule(root, parent), leaf, stored)
        else:
            _submodule(root, parent).add_module(leaf, _module_from_plain(stored, plain["modules"]))
    for name, stored in plain["modules"].items():
        for leaf, source in stored.get("tied", {}).items():
            setattr(root.get_submodule(name), leaf, root.get_parameter(source))
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for node in plain["nodes"]:
        target = _FUNCTIONS[node["target"]] if node["op"] == "call_function" else node["target"]
        arguments = tuple(_argument_from_plain(value, made) for value in node["args"])
        keywords = {key: _argument_from_plain(value, made) for key, value in node["kwargs"].items()}
        made[node["name"]] = graph.create_node(
            node["op"], target, arguments, keywords, node["name"]
        )
    return make_quick(fx.GraphModule(root, graph)).eval()


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}

_OPERATIONS = ("placeholder", "output", "call_module", "call_function", "call_method", "get_attr")


def check_plain(plain: dict[str, Any]) -> None:
    """Checks what would be looked up or become code when a network is made of plain data, before
    anything is made.

    torch.fx writes names into code that it runs, and calls methods by their name: nothing but names
    of ours may get there.

    Raises:
        ValueError: if a name is none, or an operation, module or method is not one that `serialise`
            stores.
    """
    for name, stored in plain["modules"].items():
        _check_path(name)
        if stored["kind"] not in _TENSORS and stored["kind"] not in _MODULES:
            raise ValueError(f"it has a module of the unknown kind {_shown(stored['kind'])}")
    modules = plain["modules"]
    known = {
        "call_function": _FUNCTIONS,
        "call_method": _METHODS,
        "call_module": modules,
        "get_attr": modules,
    }
    for node in plain["nodes"]:
        operation, target = node["op"], node["target"]
        if operation not in _OPERATIONS or target not in known.get(operation, [target]):
            raise ValueError(
                f"it has an unknown operation, {_shown(operation)} of {_shown(target)}"
            )
        for name in (
            node["name"],
            *node["kwargs"],
            *([target] if operation == "placeholder" else []),
        ):
            _check_path(name, parts=1)


def _check_path(path: object, parts: int | None = None) -> None:
    """Raises ValueError if `path` is not names with dots between them, each an identifier or a
    number."""
    names = path.split(".") if isinstance(path, str) else []
    plain = all(name.isidentifier() or name.isdecimal() for name in names)
    if (
        not names
        or not plain
        or any(name.startswith("__") for name in names)
        or parts not in (None, len(names))
    ):
        raise ValueError(f"{_shown(path)} is no name of a part of a network")


def _shown(value: object) -> str:
    """What is said of a value that should not be there."""
    return repr(value)[:60]


def _module_to_plain(module: nn.Module, name: str) -> dict[str, Any]:
    if type(module) not in _KINDS:
        raise ValueError(f"cannot store a {type(module).__name__} ('{name}') as plain data")
    kind = _KINDS[type(module)]
    arguments = {
        argument: _argument_to_plain(getattr(module, argument)) for argument in _MODULES[kind][1]
    }
    if isinstance(module, nn.Linear | nn.Bilinear | Conv | nn.LayerNorm | ConvTranspose):
        arguments["bias"] = module.bias is not None
    state = {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}
    return {"kind": kind, "arguments": arguments, "state": state}


def _tensor_to_plain(network: fx.GraphModule, name: str) -> dict[str, Any]:
    """A parameter or buffer that the network's own code reads, such as an embedding of
    positions."""
    parent, _, leaf = name.rpartition(".")
    tensor = getattr(network.get_submodule(parent), leaf)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"cannot store '{name}' ({type(tensor).__name__}) as plain data")
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    return {"kind": kind, "arguments": {}, "state": {"value": tensor.detach().cpu().clone()}}


def _tensor_from_plain(owner: nn.Module, leaf: str, stored: dict[str, Any]) -> None:
    tensor: torch.Tensor = stored["state"]["value"]
    if stored["kind"] == "parameter":
        owner.register_parameter(leaf, nn.Parameter(tensor))
    else:
        owner.register_buffer(leaf, tensor)


def _tie(plain: dict[str, Any], module: nn.Module, name: str, kept: dict[int, str]) -> None:
    """Keeps a parameter that another module holds too where it was first: `tied` says which."""
    for leaf, parameter in module.named_parameters():
        source = kept.setdefault(id(parameter), f"{name}.{leaf}")
        if source != f"{name}.{leaf}":
            plain.setdefault("tied", {})[leaf] = source
            del plain["state"][leaf]


def _module_from_plain(stored: dict[str, Any], modules: dict[str, Any]) -> nn.Module:
    cls, _ = _MODULES[stored["kind"]]
    arguments = {key: _argument_from_plain(value, {}) for key, value in stored["arguments"].items()}
    with torch.device("meta"):
        module = cls(**arguments)
    tied = {leaf: source.rpartition(".") for leaf, source in stored.get("tied", {}).items()}
    state = {leaf: modules[owner]["state"][name] for leaf, (owner, _, name) in tied.items()}
    module.load_state_dict(stored["state"] | state, assign=True)
    return module


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _argument_to_plain(value: Any) -> Any:
    """Nodes become {"node": name}, tuples {"tuple": […]}, slices {"slice": […]}, types
    {"dtype": name}; numbers, strings, None and lists stay."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_argument_to_plain(item) for item in value]}
    if isinstance(value, slice):
        return {
            "slice": [_argument_to_plain(item) for item in (value.start, value.stop, value.step)]
        }
    if isinstance(value, list):
        return [_argument_to_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"cannot store the argument {value!r} as plain data")


def _argument_from_plain(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, dict):
        if "node" in value:
            return made[value["node"]]
        if "dtype" in value:
            return _DTYPES[value["dtype"]]
        if "slice" in value:
            return slice(*(_argument_from_plain(item, made) for item in value["slice"]))
        return tuple(_argument_from_plain(item, made) for item in value["tuple"])
    if isinstance(value, list):
        return [_argument_from_plain(item, made) for item in value]
    return value
