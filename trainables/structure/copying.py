"""Copies of networks, and networks that stay as they are while they are traced."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copied(network: ModuleT) -> ModuleT:
    """A deep copy of a network. What modules keep that was computed, such as a cache of attention
    biases, is copied by its values: torch copies no tensor that has a history.

    It is told at once what becomes of a module's many empty dictionaries: they take most of its
    time.
    """
    attributes: list[object] = []
    for module in network.modules():
        attributes += vars(module).values()
    known: dict[int, Any] = {}
    for value in attributes:
        if isinstance(value, dict) and not value:
            known[id(value)] = type(value)()
    for tensor in _computed(attributes):
        without_history = tensor.detach()
        known[id(tensor)] = without_history.clone()
    return copy.deepcopy(network, known)


def _computed(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors with a history within nested values."""
    for value in values:
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        elif isinstance(value, dict):
            yield from _computed(value.values())
        elif isinstance(value, list | tuple):
            yield from _computed(value)


@contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Takes back what the network's own code keeps in its modules, and in their lists and
    dictionaries, while it is traced: what it computes then are no numbers."""
    kept = []
    held = []
    for module in network.modules():
        held.append((module, dict(vars(module))))
        for name, value in vars(module).items():
            is_container = type(value) in (list, dict, OrderedDict, defaultdict)
            if is_container and name not in _OF_MODULES:
                before = copy.copy(value)
                kept.append((value, before))
    try:
        yield
    finally:
        for module, attributes in held:
            vars(module).clear()
            vars(module).update(attributes)
        for value, before in kept:
            value.clear()
            if isinstance(value, dict):
                value.update(before)
            else:
                value.extend(before)


_OF_MODULES = frozenset(vars(nn.Module()))
"""What each module has."""
