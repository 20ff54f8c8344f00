"""Which cases of a test are tried each time; the rest are slow: `make test-all` tries them too."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def often(values: Iterable[Any], *some: Any) -> list[Any]:
    """Values of a parameter, of which `some` are tried each time."""
    return [
        pytest.param(value, marks=() if value in some else pytest.mark.slow) for value in values
    ]


def each_once(names: Iterable[Any], kinds: Sequence[Any]) -> list[Any]:
    """Each name with each kind, of which each name with one kind is tried each time, in turn."""
    pairs = []
    for place, name in enumerate(names):
        now = kinds[place % len(kinds)]
        for kind in kinds:
            marks = () if kind == now else pytest.mark.slow
            pairs.append(pytest.param(name, kind, marks=marks))
    return pairs
