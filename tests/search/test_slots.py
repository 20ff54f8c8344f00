"""Slots whose process dies: who has a task hears of it at once, who leaves has left, who waits
hears of it when it is asked. With Ray's own manager and processes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.air.execution import FixedResourceManager, ResourceRequest
from ray.exceptions import RayActorError

from slimfront.search.engine.ray_internals.slots import SlotManager
from tests.search.clusters import wait_for

pytestmark = pytest.mark.usefixtures("ray_session")


class Trainable:
    """Says its process, and waits for ever when it is asked to train."""

    def __init__(self, begins: str = "/") -> None:
        wait_for(Path(begins).exists, 60)

    def pid(self) -> int:
        return os.getpid()

    def train(self) -> None:
        threading.Event().wait()

    def stop(self) -> None:
        pass


def kind(error: Exception) -> str:
    """Ray tells of a process that was lost by one of several errors, of one base."""
    return RayActorError.__name__ if isinstance(error, RayActorError) else type(error).__name__


class Search:
    """Slots in one process, and what is said of them."""

    def __init__(self, cores: int = 1) -> None:
        self.manager = SlotManager(FixedResourceManager({"CPU": cores}), 4, lambda: 1)
        self.said: list[str] = []
        self.actor = ray.remote(Trainable)

    def add(self, name: str, **arguments: Any) -> Any:
        said = self.said
        return self.manager.add_actor(
            self.actor,
            ResourceRequest([{"CPU": 1}]),
            arguments,
            on_start=lambda _: said.append(f"{name} began"),
            on_stop=lambda _: said.append(f"{name} left"),
            on_error=lambda _, error: said.append(f"{name} died of {kind(error)}"),
        )

    def ask(self, slot: Any, method: str) -> None:
        self.manager.schedule_actor_task(
            slot,
            method,
            on_result=lambda _, result: self.said.append(f"{method}: {result}"),
            on_error=lambda _, error: self.said.append(f"{method} failed"),
        )

    def happens(self, *wanted: str) -> None:
        """Handles events until these were said, in any order, and nothing else."""
        wait_for(lambda: (self.manager.next(1) and False) or set(wanted) <= set(self.said), 60)
        while self.manager.next(0.2):
            pass
        assert sorted(self.said) == sorted(wanted)
        self.said.clear()

    def kill(self, slot: Any) -> None:
        """Kills the process of a slot, whose answer to `pid` is awaited."""
        self.ask(slot, "pid")
        wait_for(lambda: (self.manager.next(1) and False) or self.said, 60)
        os.kill(int(self.said.pop().removeprefix("pid: ")), signal.SIGKILL)


@pytest.fixture
def started() -> Iterator[Callable[..., Search]]:
    made: list[Search] = []

    def start(**options: int) -> Search:
        made.append(Search(**options))
        return made[-1]

    yield start
    for search in made:
        search.manager.cleanup()


def test_each_slot_of_a_dead_process_is_told_once_and_as_ray_tune_expects(
    started: Callable[..., Search],
) -> None:
    search = started()
    manager = search.manager
    busy, leaving, idle = (search.add(name) for name in ("busy", "leaving", "idle"))
    search.happens("busy began", "leaving began", "idle began")
    search.ask(busy, "pid")
    wait_for(lambda: (manager.next(1) and False) or search.said, 60)
    process = int(search.said.pop().removeprefix("pid: "))
    # The process works for one slot at a time: the others wait for their turn.
    search.ask(busy, "train")
    search.add("new")
    assert manager.remove_actor(leaving)
    os.kill(process, signal.SIGKILL)
    died = "died of RayActorError"
    search.happens(f"busy {died}", "train failed", "leaving left", f"new {died}")
    assert manager.is_actor_started(idle)
    assert manager.num_total_actors == 1
    search.ask(idle, "reset")
    assert search.said == []  # not before the next event
    assert manager.next(0)
    assert search.said == [f"idle {died}", "reset failed"]
    assert manager.num_total_actors == 0
    assert not manager.next(0)


def test_a_slot_that_waits_in_a_dead_process_can_still_leave(
    started: Callable[..., Search],
) -> None:
    search = started()
    busy, idle = search.add("busy"), search.add("idle")
    search.happens("busy began", "idle began")
    search.kill(busy)
    search.ask(busy, "train")
    search.happens("busy died of RayActorError", "train failed")
    assert search.manager.remove_actor(idle)
    assert search.manager.next(0)
    assert search.said == ["idle left"]


def test_a_slot_is_starting_from_when_its_process_has_resources_until_it_is_taken(
    started: Callable[..., Search], tmp_path: Path
) -> None:
    waits = started(cores=0)
    no_resources = waits.add("a")
    assert not waits.manager.next(0.2)
    assert not waits.manager.is_starting(no_resources)
    search = started()
    slot = search.add("b", begins=str(tmp_path / "begin"))
    assert not search.manager.is_starting(slot)
    wait_for(lambda: (search.manager.next(0.1) and False) or search.manager.is_starting(slot), 60)
    (tmp_path / "begin").touch()
    search.happens("b began")
    assert not search.manager.is_starting(slot)
