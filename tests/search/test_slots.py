"""Slots whose process dies: who has a task hears of it at once, who leaves has left, who waits
hears of it when it is asked."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from slimfront.search.engine.ray_internals import slots
from slimfront.search.engine.ray_internals.slots import SlotManager


class Inner:
    """Stands in for Ray's manager: a process that does what it is told when it is told."""

    def __init__(self, _: Any) -> None:
        self.asked: list[tuple[str, Any, Any]] = []
        self._live_actors_to_ray_actors_resources = {"process": (SimpleNamespace(), None)}

    def add_actor(self, _cls: Any, _kwargs: Any, _request: Any, on_error: Any) -> str:
        self.dies = lambda error: on_error("process", error)
        return "process"

    def schedule_actor_task(
        self, _actor: str, method: str, _arguments: Any, on_result: Any, on_error: Any
    ) -> None:
        self.asked.append((method, on_result, on_error))

    def answer(self, method: str) -> None:
        found = next(entry for entry in self.asked if entry[0] == method)
        self.asked.remove(found)
        found[1]("process", None)

    def remove_actor(self, _actor: str) -> None:
        raise AssertionError("it is dead")

    def next(self, _timeout: float | None) -> bool:
        return False


class Trainable:
    _default_options: ClassVar[dict[str, Any]] = {}
    __ray_metadata__ = SimpleNamespace(modified_class=SimpleNamespace(__ray_actor_class__=object))


def test_each_slot_of_a_dead_process_is_told_once_and_as_ray_tune_expects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "RayActorManager", Inner)
    said: list[str] = []
    manager = SlotManager(None, 4, lambda: 1)  # type: ignore[arg-type]
    tracked = {}
    for name in ("busy", "leaving", "idle", "new"):
        tracked[name] = manager.add_actor(
            Trainable,
            None,
            {},  # type: ignore[arg-type]
            on_start=lambda _, name=name: said.append(f"{name} began"),
            on_stop=lambda _, name=name: said.append(f"{name} left"),
            on_error=lambda _, error, name=name: said.append(f"{name} died of {error}"),
        )
    inner: Any = manager.inner
    for _ in range(3):
        inner.answer("create")
    manager.schedule_actor_task(
        tracked["busy"], "train", on_error=lambda _, error: said.append(f"train failed by {error}")
    )
    assert manager.remove_actor(tracked["leaving"])
    said.clear()
    inner.dies(RuntimeError("x"))
    assert said == ["busy died of x", "train failed by x", "leaving left", "new died of x"]
    assert manager.is_actor_started(tracked["idle"])
    assert manager.num_total_actors == 1
    manager.schedule_actor_task(
        tracked["idle"], "reset", on_error=lambda _, error: said.append(f"reset failed by {error}")
    )
    assert said[4:] == []  # not before the next event
    assert manager.next(0)
    assert said[4:] == ["idle died of x", "reset failed by x"]
    assert manager.num_total_actors == 0
    assert not manager.next(0)


def test_a_slot_that_waits_in_a_dead_process_can_still_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "RayActorManager", Inner)
    said: list[str] = []
    manager = SlotManager(None, 4, lambda: 1)  # type: ignore[arg-type]
    tracked = manager.add_actor(
        Trainable,
        None,
        {},
        lambda _: None,
        lambda _: said.append("left"),
        lambda *_: said.append("died"),  # type: ignore[arg-type]
    )
    inner: Any = manager.inner
    inner.answer("create")
    inner.dies(RuntimeError("x"))
    assert manager.remove_actor(tracked)
    assert manager.next(0)
    assert said == ["left"]


def test_a_slot_is_starting_from_when_its_process_has_resources_until_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "RayActorManager", Inner)
    manager = SlotManager(None, 4, lambda: 1)  # type: ignore[arg-type]
    inner: Any = manager.inner
    live, inner._live_actors_to_ray_actors_resources = (
        inner._live_actors_to_ray_actors_resources,
        {},
    )
    tracked = manager.add_actor(
        Trainable, None, {}, lambda _: None, lambda _: None, lambda *_: None
    )  # type: ignore[arg-type]
    assert not manager.is_starting(tracked)
    inner._live_actors_to_ray_actors_resources = live
    assert manager.is_starting(tracked)
    inner.answer("create")
    assert not manager.is_starting(tracked)
