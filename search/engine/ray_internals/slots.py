"""Several trials of Ray Tune in one process: each takes a slot where Ray Tune would start an actor
of its own.

To Ray Tune nothing is different: trials start, report, are saved, stopped and restored one by one.
Only its manager of actors is another, for the time of a search. Measured against one thin actor for
each trial in docs/performance.md.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.air.execution import ResourceManager, ResourceRequest
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.execution import tune_controller

from slimfront.trainables.packs.together import SharedProcess

Callback = Callable[..., None]


@contextmanager
def shared_processes(size: int, processes: Callable[[], int]) -> Iterator[None]:
    """Within, searches put `size` trials into one process, and start up to `processes()` of these
    before they fill any.

    The resources of a trial are then those of a process.
    """
    if size == 1:
        yield
        return
    before = tune_controller.RayActorManager
    tune_controller.RayActorManager = partial(SlotManager, size=size, processes=processes)
    try:
        yield
    finally:
        tune_controller.RayActorManager = before


@dataclass(eq=False)
class Process:
    """An actor of Ray's, with `size` slots."""

    request: ResourceRequest
    actor: TrackedActor | None = None
    taken: dict[int, TrackedActor] = field(default_factory=dict)


@dataclass(eq=False)
class Slot:
    """What Ray Tune takes for an actor."""

    process: Process
    number: int
    begun: bool = False
    leaving: bool = False
    lost: Exception | None = None
    """Why its process is gone, while nobody has asked for anything since."""
    tasks: dict[int, Callback | None] = field(default_factory=dict)
    """What is to be told if they fail, by number."""


class Handle:
    """What Ray Tune asks of the handle of an actor."""

    def __init__(self, actor: Any, slot: int) -> None:
        for method in ("get_auto_filled_metrics", "get_current_ip_pid"):
            setattr(self, method, _Method(actor, slot, method))


class _Method:
    def __init__(self, actor: Any, slot: int, method: str) -> None:
        self.actor = actor
        self.slot = slot
        self.method = method

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.actor.call.remote(self.slot, self.method, arguments, named)


class SlotManager:
    """In the place of Ray Tune's `RayActorManager`, with what Ray Tune uses of it: its actors are
    slots in processes.

    A process that dies takes all its slots with it: each trial fails as if its own process had
    died.
    """

    def __init__(
        self, resource_manager: ResourceManager, size: int, processes: Callable[[], int]
    ) -> None:
        self.inner = RayActorManager(resource_manager)
        self.size = size
        self.most = processes
        self.processes: list[Process] = []
        self.slots: dict[TrackedActor, Slot] = {}
        self.failed: set[TrackedActor] = set()
        self.numbers = itertools.count()
        self.late: deque[Callable[[], None]] = deque()
        """What is to be told at the next event."""
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Handle, None]] = {}

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_pending_actors = property(lambda self: len(self.slots) - self.num_live_actors)
    num_total_actors = property(lambda self: len(self.slots))
    num_actor_tasks = property(lambda self: sum(len(slot.tasks) for slot in self.slots.values()))

    def get_live_actors_resources(self) -> dict[str, float]:
        """What is in use, by Ray's names."""
        resources: dict[str, float] = self.inner.get_live_actors_resources()
        return resources

    def next(self, timeout: float | None = None) -> bool:
        """Handles the next event, if there is one in time."""
        if self.late:
            self.late.popleft()()
            return True
        happened: bool = self.inner.next(timeout)
        return happened

    def cleanup(self) -> None:
        """Ends all processes."""
        self.inner.cleanup()

    def add_actor(
        self,
        cls: Any,
        resource_request: ResourceRequest,
        kwargs: dict[str, Any],
        on_start: Callback,
        on_stop: Callback,
        on_error: Callback,
    ) -> TrackedActor:
        """A slot, in a process that is started if need be."""
        tracked = TrackedActor(
            next(self.numbers), on_start=on_start, on_stop=on_stop, on_error=on_error
        )
        process = self._process(cls, resource_request)
        slot = self.slots[tracked] = Slot(process, next(self.numbers))
        process.taken[slot.number] = tracked

        def created(_: None) -> None:
            handle, _ = self.inner._live_actors_to_ray_actors_resources[process.actor]
            slot.begun = True
            self._live_actors_to_ray_actors_resources[tracked] = (Handle(handle, slot.number), None)
            on_start(tracked)

        def fails(error: Exception) -> None:
            self.failed.add(tracked)
            self._forget(tracked)
            on_error(tracked, error)

        self._ask(slot, "create", (slot.number, kwargs), created, fails)
        return tracked

    def _process(self, cls: Any, request: ResourceRequest) -> Process:
        there = [process for process in self.processes if process.request == request]
        free = [process for process in there if len(process.taken) < self.size]
        if free and len(there) >= self.most():
            return min(free, key=lambda process: len(process.taken))
        process = Process(request)
        self.processes.append(process)
        # Ray Tune's own class of actors, made of the trainable, has the options that we need too.
        made = ray.remote(**cls._default_options, max_concurrency=self.size + 4)(SharedProcess)
        trainable = cls.__ray_metadata__.modified_class.__ray_actor_class__
        process.actor = self.inner.add_actor(
            made,
            {"trainable": trainable},
            request,
            on_error=lambda _, error: self._lost(process, error),
        )
        return process

    def _lost(self, process: Process, error: Exception) -> None:
        """The process died, or could not start. Ray Tune hears of a slot that waits for a trial
        when it asks for it next."""
        if process in self.processes:
            self.processes.remove(process)
        for tracked in list(process.taken.values()):
            slot = self.slots.get(tracked)
            if slot is None:  # Ray Tune took it away when it heard of another
                continue
            slot.lost = error
            if slot.tasks or not slot.begun:
                self._fail(tracked, error)

    def _fail(self, tracked: TrackedActor, error: Exception) -> None:
        slot = self.slots.pop(tracked)
        self._live_actors_to_ray_actors_resources.pop(tracked, None)
        tasks = slot.tasks
        slot.tasks = {}
        if slot.leaving:
            if tracked._on_stop:
                tracked._on_stop(tracked)
            return
        self.failed.add(tracked)
        if tracked._on_error:
            tracked._on_error(tracked, error)
        for told in tasks.values() if slot.begun else ():
            if told:
                told(error)

    def remove_actor(
        self,
        tracked_actor: TrackedActor,
        kill: bool = False,
        stop_future: Any = None,  # noqa: ARG002 (nobody waits)
    ) -> bool:
        """Has a slot left, and then its process ended if it was the last; whether `on_stop` will be
        called."""
        slot = self.slots.get(tracked_actor)
        if slot is None:
            return False
        begun = self._live_actors_to_ray_actors_resources.pop(tracked_actor, None) is not None
        if kill or not begun:
            self._forget(tracked_actor)
            return False

        slot.leaving = True

        def gone(_: Any) -> None:
            self._forget(tracked_actor)
            if tracked_actor._on_stop:
                tracked_actor._on_stop(tracked_actor)

        self._ask(slot, "leave", (slot.number,), gone, gone)
        return True

    def _forget(self, tracked: TrackedActor) -> None:
        slot = self.slots.pop(tracked)
        slot.tasks.clear()
        process = slot.process
        del process.taken[slot.number]
        if not process.taken and process in self.processes:
            self.processes.remove(process)
            self.inner.remove_actor(process.actor)

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Whether the slot was taken, and is there."""
        return tracked_actor in self.slots and self.slots[tracked_actor].begun

    def is_starting(self, tracked_actor: TrackedActor) -> bool:
        """Whether its process has its resources, and the slot was not taken yet."""
        slot = self.slots.get(tracked_actor)
        return (
            slot is not None
            and not slot.begun
            and slot.process.actor in self.inner._live_actors_to_ray_actors_resources
        )

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        """Whether it was lost."""
        return tracked_actor in self.failed

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """What the slot was asked for is of no interest any more."""
        if tracked_actor in self.slots:
            self.slots[tracked_actor].tasks.clear()

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        on_result: Callback | None = None,
        on_error: Callback | None = None,
        _return_future: bool = False,
    ) -> None:
        """Calls a method of the slot's trainable; `stop` is part of leaving."""
        slot = self.slots.get(tracked_actor)
        if slot is None or method_name == "stop":
            return
        result = None
        if on_result:
            result = partial(on_result, tracked_actor)
        error = None
        if on_error:
            error = partial(on_error, tracked_actor)
        self._ask(slot, "call", (slot.number, method_name, args or (), kwargs or {}), result, error)

    def _ask(
        self,
        slot: Slot,
        method: str,
        arguments: tuple[Any, ...],
        on_result: Callback | None,
        on_error: Callback | None,
    ) -> None:
        """Asks the process of a slot for something; told of is what comes back while it is of
        interest."""
        number = next(self.numbers)
        slot.tasks[number] = on_error
        tracked = slot.process.taken[slot.number]
        lost = slot.lost
        if lost is not None:
            self.late.append(lambda: self._fail(tracked, lost) if slot.tasks else None)
            return

        def result(_: TrackedActor, value: Any) -> None:
            if number in slot.tasks:
                del slot.tasks[number]
                if on_result:
                    on_result(value)

        def error(_: TrackedActor, why: Exception) -> None:
            if slot.tasks.pop(number, None):
                on_error(why)  # type: ignore[misc]

        self.inner.schedule_actor_task(
            slot.process.actor, method, arguments, on_result=result, on_error=error
        )
