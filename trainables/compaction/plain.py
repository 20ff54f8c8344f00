"""A compact network as plain data and tensors, so that a checkpoint loads with `weights_only=True`
and no pickled code."""

from typing import Any

import torch
from torch import fx, nn

from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.structure import operations

FORMAT = 2

_TENSORS = ("parameter", "buffer")


def serialise(network: fx.GraphModule) -> dict[str, Any]:
    """A traced network as a dictionary of plain data and tensors.

    Raises:
        ValueError: if the network holds a module or an operation that is none of `operations`.
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
        ValueError: if it is none of `operations`.
    """
    target = str(node.target)
    if node.op == "call_function":
        if node.target is getattr and node.args[1] in operations.ATTRIBUTES:
            return str(node.args[1]), node.args[:1]
        name = operations.name_of(node.target)
        if name is not None:
            return name, node.args
        raise ValueError(f"cannot store the operation '{node.name}' ({target}) as plain data")
    if node.op == "call_method" and target not in operations.methods():
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
        target = node["target"]
        arguments = tuple(_argument_from_plain(value, made) for value in node["args"])
        if node["op"] == "call_function" and target in operations.ATTRIBUTES:
            target, arguments = getattr, (*arguments, target)
        elif node["op"] == "call_function":
            target = operations.function_of(target)
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
        if stored["kind"] not in _TENSORS and operations.kind_of(stored["kind"]) is None:
            raise ValueError(f"it has a module of the unknown kind {_shown(stored['kind'])}")
    for node in plain["nodes"]:
        operation, target = node["op"], node["target"]
        if operation not in _OPERATIONS or not _is_known(operation, target, plain["modules"]):
            raise ValueError(
                f"it has an unknown operation, {_shown(operation)} of {_shown(target)}"
            )
        for name in (
            node["name"],
            *node["kwargs"],
            *([target] if operation == "placeholder" else []),
        ):
            _check_path(name, parts=1)


def _is_known(operation: str, target: object, modules: dict[str, Any]) -> bool:
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
    plain = all(name.replace("-", "_").isidentifier() or name.isdecimal() for name in names)
    if parts is not None:  # it stands in code as it is
        plain = plain and all(name.isidentifier() for name in names)
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
    kind = type(module).__name__
    if not operations.is_kind(module):
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data")
    try:
        arguments = {
            argument: _argument_to_plain(value)
            for argument, value in operations.arguments_of(module).items()
        }
    except ValueError as error:
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data: {error}") from None
    state = {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}
    plain = {"kind": kind, "arguments": arguments, "state": state}
    _check_rebuilt(module, name, plain)
    return plain


def _check_rebuilt(module: nn.Module, name: str, plain: dict[str, Any]) -> None:
    """Raises ValueError if a module would not come back with its shapes and settings."""
    kind = plain["kind"]
    rebuilt = _rebuilt(kind, plain["arguments"])
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    if {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} != shapes:
        raise ValueError(
            f"cannot store a {kind} ('{name}') as plain data: its tensors are not those that its "
            "settings make"
        )
    if rebuilt.extra_repr() != module.extra_repr():
        raise ValueError(
            f"cannot store a {kind} ('{name}') as plain data: its settings are not all known "
            f"({module.extra_repr()})"
        )


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


def _rebuilt(kind: str, arguments: dict[str, Any]) -> nn.Module:
    """A module of this kind, whose tensors have no memory."""
    made = operations.kind_of(kind)
    assert made is not None
    given = {key: _argument_from_plain(value, {}) for key, value in arguments.items()}
    with torch.device("meta"):
        return made(**given)


def _module_from_plain(stored: dict[str, Any], modules: dict[str, Any]) -> nn.Module:
    module = _rebuilt(stored["kind"], stored["arguments"])
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
        return "mapping", [[_argument_to_plain(part) for part in pair] for pair in value.items()]
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
