"""Tensors that code makes while torch.fx traces it, of sizes that follow from the inputs: masks and
positions, say. torch.fx sees what is done with tensors, and not what makes them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import fx

_FACTORIES = (
    *("arange", "linspace", "eye", "zeros", "ones", "full", "empty", "tril_indices"),
    *("triu_indices", "rand", "randn"),
)


@contextmanager
def factories_seen() -> Iterator[None]:
    """Within, torch's functions that make tensors are nodes of the graph where a size, a type or a
    device is one."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}
    for name, factory in originals.items():
        setattr(torch, name, _seen(factory))
    try:
        yield
    finally:
        for name, factory in originals.items():
            setattr(torch, name, factory)


def _seen(factory: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(factory)
    def called(*args: Any, **kwargs: Any) -> Any:
        proxy = next(_proxies((*args, *kwargs.values())), None)
        if proxy is None:
            return factory(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", factory, args, kwargs)

    return called


def _proxies(arguments: Iterable[Any]) -> Iterator[fx.Proxy]:
    """What stands for something that is not known yet, in lists too."""
    for argument in arguments:
        if isinstance(argument, fx.Proxy):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _proxies(argument)
