"""Arguments of operations and modules as plain data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

Plain = dict[str, Any]
"""Plain data and tensors, by name."""


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex32, torch.complex64, torch.complex128),
    )
}


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


def arguments_to_plain(values: Mapping[str, Any]) -> Plain:
    """Arguments by name as plain data."""
    found = {}
    for name, value in values.items():
        found[name] = argument_to_plain(value)
    return found


def arguments_from_plain(values: Plain, made: dict[str, Node]) -> Plain:
    """The same back; nodes among them were `made` before, by name."""
    found = {}
    for name, value in values.items():
        found[name] = argument_from_plain(value, made)
    return found


def argument_to_plain(value: Any) -> Any:
    """Nodes become {"node": name}, tuples {"tuple": […]}, mappings {"mapping": [[key, value], …]},
    slices {"slice": […]}, "..." {"ellipsis": True}, devices {"device": name} and other constants of
    torch {"dtype": name} and the like; numbers, strings, None and lists stay."""
    if value is None:
        return value
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [argument_to_plain(item) for item in value]
    form, content = _form(value)
    return {form: content}


def _form(value: Any) -> tuple[str, Any]:
    """What an argument that is no plain value is stored as.

    Raises:
        ValueError: if it cannot be stored.
    """
    if isinstance(value, Node):
        return "node", value.name
    if isinstance(value, tuple):
        return "tuple", argument_to_plain(list(value))
    if isinstance(value, slice):
        parts = [
            value.start,
            value.stop,
            value.step,
        ]
        return "slice", argument_to_plain(parts)
    if isinstance(value, dict):
        pairs = [list(pair) for pair in value.items()]
        return "mapping", argument_to_plain(pairs)
    if isinstance(value, torch.device):
        return "device", str(value)
    if value is Ellipsis:
        return "ellipsis", True
    for name, (kind, _) in _NAMED.items():
        if isinstance(value, kind):
            return name, str(value).removeprefix("torch.")
    raise ValueError(f"cannot store the argument {value!r} as plain data")


def argument_from_plain(value: Any, made: dict[str, Node]) -> Any:
    """What `argument_to_plain` stored; nodes were `made` before, by name."""
    if isinstance(value, list):
        return [argument_from_plain(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((form, content),) = value.items()
    if form == "node":
        return made[content]
    if form in _NAMED:
        _, constants = _NAMED[form]
        return constants[content]
    if form == "device":
        return torch.device(content)
    if form == "ellipsis":
        return Ellipsis
    items = argument_from_plain(content, made)
    if form == "slice":
        return slice(*items)
    if form == "mapping":
        return dict(items)
    return tuple(items)
