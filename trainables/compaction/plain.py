"""A compact network as plain data and tensors, so that a checkpoint loads with `weights_only=True`
and no pickled code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from slimfront.trainables.compaction.layers import tensor_at
from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.structure import operations

FORMAT = 2

_TENSORS = ("parameter", "buffer")

Plain = dict[str, Any]
"""Plain data and tensors, by name."""


def serialise(network: fx.GraphModule) -> Plain:
    """A traced network as a dictionary of plain data and tensors.

    Raises:
        ValueError: if the network holds a module or an operation that is none of `operations`.
    """
    modules: dict[str, Plain] = {}
    places: dict[int, str] = {}
    nodes = []
    for node in network.graph.nodes:
        target, values = _operation(node)
        if node.op == "call_module" and target not in modules:
            module = network.get_submodule(target)
            modules[target] = _module_to_plain(module, target)
            _tie(modules[target], module, target, places)
        elif node.op == "get_attr":
            modules[target] = _tensor_to_plain(network, target)
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": [_argument_to_plain(value) for value in values],
                "kwargs": _arguments_to_plain(node.kwargs),
            }
        )
    return {"format": FORMAT, "modules": modules, "nodes": nodes}


def _operation(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of what a node does, and what it does it with.

    Raises:
        ValueError: if it is none of `operations`.
    """
    operation = node.op
    target = str(node.target)
    if operation == "call_function":
        return _function(node)
    if operation == "call_method" and target not in operations.methods():
        raise ValueError(f"cannot store the operation '{node.name}' (.{target}) as plain data")
    if operation not in _OPERATIONS:
        raise ValueError(f"cannot store '{node.name}' ({operation} {target}) as plain data")
    return target, node.args


def _function(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of a function, and its arguments; of `getattr`, the name of the attribute."""
    if node.target is getattr:
        owner, attribute, *_ = node.args
        if attribute in operations.ATTRIBUTES:
            return str(attribute), (owner,)
    name = operations.name_of(node.target)
    if name is None:
        raise ValueError(f"cannot store the operation '{node.name}' ({node.target}) as plain data")
    return name, node.args


def deserialise(plain: Plain) -> fx.GraphModule:
    """The network that `serialise` stored, in evaluation mode on the CPU, with bit-identical
    weights.

    Raises:
        ValueError: if the data is of another format.
    """
    stored_format = plain.get("format")
    if stored_format != FORMAT:
        raise ValueError(
            f"this network is stored in format {stored_format}, and this version reads "
            f"format {FORMAT}"
        )
    check_plain(plain)
    root = _modules_from_plain(plain["modules"])
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for stored in plain["nodes"]:
        name = stored["name"]
        made[name] = _node_from_plain(graph, stored, made)
    return make_quick(fx.GraphModule(root, graph)).eval()


def _modules_from_plain(modules: Plain) -> nn.Module:
    """A module with all modules, parameters and buffers of a network at their places."""
    root = nn.Module()
    for name, stored in modules.items():
        parent, _, leaf = name.rpartition(".")
        owner = _submodule(root, parent)
        if stored["kind"] in _TENSORS:
            _tensor_from_plain(owner, leaf, stored)
        else:
            owner.add_module(leaf, _module_from_plain(stored, modules))
    for name, stored in modules.items():
        tied = stored.get("tied", {})
        for leaf, source in tied.items():
            setattr(root.get_submodule(name), leaf, root.get_parameter(source))
    return root


def _node_from_plain(graph: fx.Graph, stored: Plain, made: dict[str, fx.Node]) -> fx.Node:
    """Adds a node to a graph; those that it reads were `made` before, by name."""
    operation = stored["op"]
    target = stored["target"]
    args = tuple(_argument_from_plain(value, made) for value in stored["args"])
    kwargs = _arguments_from_plain(stored["kwargs"], made)
    if operation == "call_function" and target in operations.ATTRIBUTES:
        args = (*args, target)
        target = getattr
    elif operation == "call_function":
        target = operations.function_of(target)
    return graph.create_node(operation, target, args, kwargs, stored["name"])


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}

_OPERATIONS = ("placeholder", "output", "call_module", "call_function", "call_method", "get_attr")


def check_plain(plain: Plain) -> None:
    """Checks what would be looked up or become code when a network is made of plain data, before
    anything is made.

    torch.fx writes names into code that it runs, and calls methods by their name: nothing but names
    of ours may get there.

    Raises:
        ValueError: if a name is none, or an operation, module or method is not one that `serialise`
            stores.
    """
    modules = plain["modules"]
    for name, stored in modules.items():
        _check_path(name)
        kind = stored["kind"]
        if kind not in _TENSORS and operations.kind_of(kind) is None:
            raise ValueError(f"it has a module of the unknown kind {_shown(kind)}")
    for node in plain["nodes"]:
        operation = node["op"]
        target = node["target"]
        if operation not in _OPERATIONS or not _is_known(operation, target, modules):
            raise ValueError(
                f"it has an unknown operation, {_shown(operation)} of {_shown(target)}"
            )
        _check_path(node["name"], parts=1)
        for name in node["kwargs"]:
            _check_path(name, parts=1)
        if operation == "placeholder":
            _check_path(target, parts=1)


def _is_known(operation: str, target: object, modules: Plain) -> bool:
    """Whether an operation of a stored graph has something to act on or with."""
    if operation == "call_function":
        is_attribute = isinstance(target, str) and target in operations.ATTRIBUTES
        return is_attribute or operations.function_of(target) is not None
    if operation == "call_method":
        return isinstance(target, str) and target in operations.methods()
    if operation in ("call_module", "get_attr"):
        return isinstance(target, str) and target in modules
    return True


def _check_path(path: object, parts: int | None = None) -> None:
    """Raises ValueError if `path` is not names with dots between them, each a number, or an
    identifier, but for hyphens."""
    names = path.split(".") if isinstance(path, str) else []
    right = bool(names) and all(_is_part(name) for name in names)
    if parts is not None:  # it stands in code as it is
        right = right and len(names) == parts and all(name.isidentifier() for name in names)
    if not right:
        raise ValueError(f"{_shown(path)} is no name of a part of a network")


def _is_part(name: str) -> bool:
    """Whether a name is a number, or an identifier but for hyphens, and not one of Python's own."""
    if name.startswith("__"):
        return False
    return name.isdecimal() or name.replace("-", "_").isidentifier()


def _shown(value: object) -> str:
    """What is said of a value that should not be there."""
    return repr(value)[:60]


def _module_to_plain(module: nn.Module, name: str) -> Plain:
    kind = type(module).__name__
    if not operations.is_kind(module):
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data")
    try:
        arguments = _arguments_to_plain(operations.arguments_of(module))
    except ValueError as error:
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data: {error}") from None
    state = {}
    for key, tensor in module.state_dict().items():
        state[key] = tensor.detach().cpu().clone()
    plain = {"kind": kind, "arguments": arguments, "state": state}
    _check_rebuilt(module, name, plain)
    return plain


def _check_rebuilt(module: nn.Module, name: str, plain: Plain) -> None:
    """Raises ValueError if a module would not come back with its shapes and settings."""
    kind = plain["kind"]
    rebuilt = _rebuilt(plain)
    if _shapes(rebuilt) != _shapes(module):
        raise ValueError(
            f"cannot store a {kind} ('{name}') as plain data: its tensors are not those that its "
            "settings make"
        )
    settings = module.extra_repr()
    if rebuilt.extra_repr() != settings:
        raise ValueError(
            f"cannot store a {kind} ('{name}') as plain data: its settings are not all known "
            f"({settings})"
        )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    state = module.state_dict()
    return {key: tensor.shape for key, tensor in state.items()}


def _tensor_to_plain(network: fx.GraphModule, name: str) -> Plain:
    """A parameter or buffer that the network's own code reads, such as an embedding of
    positions."""
    tensor = tensor_at(network, name)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"cannot store '{name}' ({type(tensor).__name__}) as plain data")
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    value = tensor.detach().cpu().clone()
    return {"kind": kind, "arguments": {}, "state": {"value": value}}


def _tensor_from_plain(owner: nn.Module, leaf: str, stored: Plain) -> None:
    tensor: torch.Tensor = stored["state"]["value"]
    if stored["kind"] == "parameter":
        owner.register_parameter(leaf, nn.Parameter(tensor))
    else:
        owner.register_buffer(leaf, tensor)


def _tie(plain: Plain, module: nn.Module, name: str, places: dict[int, str]) -> None:
    """Keeps a parameter that another module holds too where it was first: `tied` says which.

    `places` has the names of the parameters that were kept before, by identity.
    """
    for leaf, parameter in module.named_parameters():
        place = f"{name}.{leaf}"
        first_place = places.setdefault(id(parameter), place)
        if first_place == place:
            continue
        tied = plain.setdefault("tied", {})
        tied[leaf] = first_place
        del plain["state"][leaf]


def _rebuilt(plain: Plain) -> nn.Module:
    """The module that was stored, whose tensors have no memory."""
    kind = operations.kind_of(plain["kind"])
    assert kind is not None
    arguments = _arguments_from_plain(plain["arguments"], {})
    with torch.device("meta"):
        return kind(**arguments)


def _module_from_plain(stored: Plain, modules: Plain) -> nn.Module:
    module = _rebuilt(stored)
    state = dict(stored["state"])
    tied = stored.get("tied", {})
    for leaf, source in tied.items():
        owner, _, name = source.rpartition(".")
        state[leaf] = modules[owner]["state"][name]
    module.load_state_dict(state, assign=True)
    return module


def _submodule(root: nn.Module, path: str) -> nn.Module:
    parts = path.split(".") if path else []
    for part in parts:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


_NAMED: dict[str, tuple[type, dict[str, Any]]] = {
    "dtype": (torch.dtype, _DTYPES),
    "memory_format": (
        torch.memory_format,
        {
            name: getattr(torch, name)
            for name in (
                "contiguous_format",
                "channels_last",
                "channels_last_3d",
                "preserve_format",
            )
        },
    ),
    "layout": (torch.layout, {"strided": torch.strided}),
}
"""Constants of torch that are arguments, by what they are stored as."""


def _arguments_to_plain(values: Mapping[str, Any]) -> Plain:
    return {name: _argument_to_plain(value) for name, value in values.items()}


def _arguments_from_plain(values: Plain, made: dict[str, fx.Node]) -> Plain:
    return {name: _argument_from_plain(value, made) for name, value in values.items()}


def _argument_to_plain(value: Any) -> Any:
    """Nodes become {"node": name}, tuples {"tuple": […]}, mappings {"mapping": [[key, value], …]},
    slices {"slice": […]}, "..." {"ellipsis": True}, devices {"device": name} and other constants of
    torch {"dtype": name} and the like; numbers, strings, None and lists stay."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_argument_to_plain(item) for item in value]
    form, content = _form(value)
    return {form: content}


def _form(value: Any) -> tuple[str, Any]:
    """What an argument that is no plain value is stored as.

    Raises:
        ValueError: if it cannot be stored.
    """
    if isinstance(value, fx.Node):
        return "node", value.name
    if isinstance(value, tuple):
        return "tuple", [_argument_to_plain(item) for item in value]
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return "slice", [_argument_to_plain(part) for part in parts]
    if isinstance(value, dict):
        pairs = [_argument_to_plain(list(pair)) for pair in value.items()]
        return "mapping", pairs
    if isinstance(value, torch.device):
        return "device", str(value)
    if value is Ellipsis:
        return "ellipsis", True
    for name, (kind, _) in _NAMED.items():
        if isinstance(value, kind):
            return name, str(value).removeprefix("torch.")
    raise ValueError(f"cannot store the argument {value!r} as plain data")


def _argument_from_plain(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_argument_from_plain(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((form, content),) = value.items()
    if form == "node":
        return made[content]
    if form in _NAMED:
        return _NAMED[form][1][content]
    if form == "device":
        return torch.device(content)
    if form == "ellipsis":
        return Ellipsis
    items = _argument_from_plain(content, made)
    if form == "slice":
        return slice(*items)
    return dict(items) if form == "mapping" else tuple(items)
