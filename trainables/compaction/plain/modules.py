"""Modules, parameters and buffers as plain data and tensors."""

import torch
from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.plain.arguments import (
    Plain,
    arguments_from_plain,
    arguments_to_plain,
)
from slimfront.trainables.structure import operations
from slimfront.trainables.structure.graph import tensor_at

TENSORS = ("parameter", "buffer")


def module_to_plain(module: nn.Module, name: str) -> Plain:
    """The kind, arguments and tensors of a module.

    Raises:
        ValueError: if it is of no known kind, or would not come back as it is.
    """
    kind = type(module).__name__
    if not operations.is_kind(module):
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data")
    try:
        arguments = arguments_to_plain(operations.arguments_of(module))
    except ValueError as error:
        raise ValueError(f"cannot store a {kind} ('{name}') as plain data: {error}") from None
    state = {}
    for key, tensor in module.state_dict().items():
        state[key] = _copied(tensor)
    plain = {
        "kind": kind,
        "arguments": arguments,
        "state": state,
    }
    _check_rebuilt(module, name, plain)
    return plain


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU."""
    return tensor.detach().cpu().clone()


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
    shapes = {}
    for key, tensor in state.items():
        shapes[key] = tensor.shape
    return shapes


def tensor_to_plain(network: GraphModule, name: str) -> Plain:
    """A parameter or buffer that the network's own code reads, such as an embedding of
    positions."""
    tensor = tensor_at(network, name)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"cannot store '{name}' ({type(tensor).__name__}) as plain data")
    kind = "buffer"
    if isinstance(tensor, nn.Parameter):
        kind = "parameter"
    return {
        "kind": kind,
        "arguments": {},
        "state": {"value": _copied(tensor)},
    }


def tie(plain: Plain, module: nn.Module, name: str, places: dict[int, str]) -> None:
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


def modules_from_plain(modules: Plain) -> nn.Module:
    """A module with all modules, parameters and buffers of a network at their places."""
    root = nn.Module()
    for name, stored in modules.items():
        parent, _, leaf = name.rpartition(".")
        owner = _submodule(root, parent)
        if stored["kind"] in TENSORS:
            _tensor_from_plain(owner, leaf, stored)
        else:
            module = module_from_plain(stored, modules)
            owner.add_module(leaf, module)
    for name, stored in modules.items():
        tied = stored.get("tied", {})
        for leaf, source in tied.items():
            holder = root.get_submodule(name)
            parameter = root.get_parameter(source)
            setattr(holder, leaf, parameter)
    return root


def module_from_plain(stored: Plain, modules: Plain) -> nn.Module:
    """A module that was stored, with the parameters that are tied to those of other `modules`."""
    module = _rebuilt(stored)
    state = dict(stored["state"])
    tied = stored.get("tied", {})
    for leaf, source in tied.items():
        owner, _, name = source.rpartition(".")
        of_owner = modules[owner]["state"]
        state[leaf] = of_owner[name]
    module.load_state_dict(state, assign=True)
    return module


def _rebuilt(plain: Plain) -> nn.Module:
    """The module that was stored, whose tensors have no memory."""
    kind = operations.kind_of(plain["kind"])
    assert kind is not None
    arguments = arguments_from_plain(plain["arguments"], {})
    with torch.device("meta"):
        return kind(**arguments)


def _tensor_from_plain(owner: nn.Module, leaf: str, stored: Plain) -> None:
    tensor: torch.Tensor = stored["state"]["value"]
    if stored["kind"] == "parameter":
        owner.register_parameter(leaf, nn.Parameter(tensor))
    else:
        owner.register_buffer(leaf, tensor)


def _submodule(root: nn.Module, path: str) -> nn.Module:
    if not path:
        return root
    for part in path.split("."):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root
