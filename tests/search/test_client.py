"""Joining a cluster as a client: a head that is slow to start a server is asked again, one that is
not there is not."""

from typing import Any

import pytest

from slimfront.search.cluster import client
from slimfront.trainables.errors import UserError


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> list[str]:
    """Has `ray.init` fail so; what it was asked for."""
    coming, asked = iter(errors), list[str]()

    def init(address: str, **_: Any) -> None:
        asked.append(address)
        if (error := next(coming)) is not None:
            raise error

    monkeypatch.setattr(client.ray, "init", init)
    return asked


LATE = ConnectionAbortedError(
    'Initialization failure from server:\nTraceback (most recent call last):\n  File "x"\n'
    "RuntimeError: Starting Ray client server failed. See ray_client_server_1.err"
)


def test_a_head_that_is_slow_is_asked_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, LATE, LATE, None)
    client._connect("ray://head:1", ".")
    assert len(asked) == 3
    asked = failing(monkeypatch, LATE, LATE, LATE)
    with pytest.raises(
        UserError,
        match=(
            r"no Ray cluster answers at ray://head:1 \(RuntimeError: Starting Ray "
            r"client server failed"
        ),
    ):
        client._connect("ray://head:1", ".")
    assert len(asked) == 3


def test_a_head_that_is_not_there_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, ConnectionError("ray client connection timeout\nmore"))
    with pytest.raises(
        UserError, match=r"no Ray cluster answers at ray://head:1 \(ray client connection timeout\)"
    ):
        client._connect("ray://head:1", ".")
    assert len(asked) == 1
