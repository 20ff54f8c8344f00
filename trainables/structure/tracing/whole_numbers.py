"""`int` while torch.fx traces a network: of a number that follows from the inputs it is an
operation like others, as in the number of images that a number of windows is of. Python lets no
object say what `int` makes of it but a number, so that the code of the network is given another
`int`."""

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import fx, nn

_TRUNC = math.trunc
"""While torch.fx traces, the functions of `math` are others."""
_OURS = ("torch.", "builtins")
"""How the modules begin whose `int` stays."""


class _OfNumbers(type):
    """Has the other `int` be that of Python wherever it is no call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            if tracer.is_number_of_inputs(args[0]):
                return tracer.create_proxy("call_function", _TRUNC, args, {})
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class _Int(metaclass=_OfNumbers):
    """What stands for `int`."""


@contextmanager
def whole_numbers_seen(model: nn.Module) -> Iterator[None]:
    """Within, `int` is an operation in the code of a network's modules, and of the functions that
    stand beside it or are imported there."""
    patched = []
    for names in _globals_of(model):
        if "int" not in names:
            names["int"] = _Int
            patched.append(names)
    try:
        yield
    finally:
        for names in patched:
            del names["int"]


def _globals_of(model: nn.Module) -> list[dict[str, Any]]:
    """The names that such code sees, of the files where `int` is called."""
    found: dict[int, dict[str, Any]] = {}
    for kind in {type(module) for module in model.modules()}:
        forward = getattr(kind, "forward", None)
        if not isinstance(forward, types.FunctionType):
            continue
        for value in (*vars(kind).values(), *list(forward.__globals__.values())):
            if _calls_int(value):
                found[id(value.__globals__)] = value.__globals__
    return list(found.values())


def _calls_int(value: object) -> TypeGuard[types.FunctionType]:
    """Whether it is a function that reads `int`, and none of torch's."""
    if not isinstance(value, types.FunctionType) or "int" not in value.__code__.co_names:
        return False
    return not (value.__module__ or "").startswith(_OURS)
