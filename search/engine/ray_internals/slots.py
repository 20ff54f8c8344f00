"""Several trials of Ray Tune in one process: each takes a seat where Ray Tune would start an actor
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
def seats(size: int, processes: Callable[[], int]) -> Iterator[None]:
    """Within, searches put `size` trials into one process, and start up to `processes()` of these
    before they fill any.

    The resources of a trial are then those of a process.
    """
    if size == 1:
        yield
        return
    before = tune_controller.RayActorManager
    tune_controller.RayActorManager = partial(Seats, size=size, processes=processes)
    try:
        yield
    finally:
        tune_controller.RayActorManager = before


@dataclass(eq=False)
class Process:
    """An actor of Ray's, with `size` seats."""

    request: ResourceRequest
    actor: TrackedActor | None = None
    taken: dict[int, TrackedActor] = field(default_factory=dict)


@dataclass(eq=False)
class Seat:
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

    def __init__(self, actor: Any, seat: int) -> None:
        for method in ("get_auto_filled_metrics", "get_current_ip_pid"):
            setattr(self, method, _Method(actor, seat, method))


class _Method:
    def __init__(self, actor: Any, seat: int, method: str) -> None:
        self.actor, self.seat, self.method = actor, seat, method

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.actor.call.remote(self.seat, self.method, arguments, named)


class Seats:
    """In the place of Ray Tune's `RayActorManager`, with what Ray Tune uses of it: its actors are
    seats in processes.

    A process that dies takes all its seats with it: each trial fails as if its own process had
    died.
    """

    def __init__(
        self, resource_manager: ResourceManager, size: int, processes: Callable[[], int]
    ) -> None:
        self.inner = RayActorManager(resource_manager)
        self.size = size
        self.most = processes
        self.processes: list[Process] = []
        self.seats: dict[TrackedActor, Seat] = {}
        self.failed: set[TrackedActor] = set()
        self.numbers = itertools.count()
        self.late: deque[Callable[[], None]] = deque()
        """What is to be told at the next event."""
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Handle, None]] = {}

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_pending_actors = property(lambda self: len(self.seats) - self.num_live_actors)
    num_total_actors = property(lambda self: len(self.seats))
    num_actor_tasks = property(lambda self: sum(len(seat.tasks) for seat in self.seats.values()))

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
        """A seat, in a process that is started if need be."""
        tracked = TrackedActor(
            next(self.numbers), on_start=on_start, on_stop=on_stop, on_error=on_error
        )
        process = self._process(cls, resource_request)
        seat = self.seats[tracked] = Seat(process, next(self.numbers))
        process.taken[seat.number] = tracked

        def sits(_: None) -> None:
            handle, _ = self.inner._live_actors_to_ray_actors_resources[process.actor]
            seat.begun = True
            self._live_actors_to_ray_actors_resources[tracked] = (Handle(handle, seat.number), None)
            on_start(tracked)

        def fails(error: Exception) -> None:
            self.failed.add(tracked)
            self._forget(tracked)
            on_error(tracked, error)

        self._ask(seat, "sit", (seat.number, kwargs), sits, fails)
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
        """The process died, or could not start. Ray Tune hears of a seat that waits for a trial
        when it asks for it next."""
        if process in self.processes:
            self.processes.remove(process)
        for tracked in list(process.taken.values()):
            seat = self.seats.get(tracked)
            if seat is None:  # Ray Tune took it away when it heard of another
                continue
            seat.lost = error
            if seat.tasks or not seat.begun:
                self._fail(tracked, error)

    def _fail(self, tracked: TrackedActor, error: Exception) -> None:
        seat = self.seats.pop(tracked)
        self._live_actors_to_ray_actors_resources.pop(tracked, None)
        tasks, seat.tasks = seat.tasks, {}
        if seat.leaving:
            if tracked._on_stop:
                tracked._on_stop(tracked)
            return
        self.failed.add(tracked)
        if tracked._on_error:
            tracked._on_error(tracked, error)
        for told in tasks.values() if seat.begun else ():
            if told:
                told(error)

    def remove_actor(
        self,
        tracked_actor: TrackedActor,
        kill: bool = False,
        stop_future: Any = None,  # noqa: ARG002 (nobody waits)
    ) -> bool:
        """Has a seat left, and then its process ended if it was the last; whether `on_stop` will be
        called."""
        seat = self.seats.get(tracked_actor)
        if seat is None:
            return False
        begun = self._live_actors_to_ray_actors_resources.pop(tracked_actor, None) is not None
        if kill or not begun:
            self._forget(tracked_actor)
            return False

        seat.leaving = True

        def gone(_: Any) -> None:
            self._forget(tracked_actor)
            if tracked_actor._on_stop:
                tracked_actor._on_stop(tracked_actor)

        self._ask(seat, "leave", (seat.number,), gone, gone)
        return True

    def _forget(self, tracked: TrackedActor) -> None:
        seat = self.seats.pop(tracked)
        seat.tasks.clear()
        process = seat.process
        del process.taken[seat.number]
        if not process.taken and process in self.processes:
            self.processes.remove(process)
            self.inner.remove_actor(process.actor)

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Whether the seat was taken, and is there."""
        return tracked_actor in self.seats and self.seats[tracked_actor].begun

    def is_starting(self, tracked_actor: TrackedActor) -> bool:
        """Whether its process has its resources, and the seat was not taken yet."""
        seat = self.seats.get(tracked_actor)
        return (
            seat is not None
            and not seat.begun
            and seat.process.actor in self.inner._live_actors_to_ray_actors_resources
        )

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        """Whether it was lost."""
        return tracked_actor in self.failed

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """What the seat was asked for is of no interest any more."""
        if tracked_actor in self.seats:
            self.seats[tracked_actor].tasks.clear()

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
        """Calls a method of the seat's trainable; `stop` is part of leaving."""
        seat = self.seats.get(tracked_actor)
        if seat is None or method_name == "stop":
            return
        result = partial(on_result, tracked_actor) if on_result else None
        error = partial(on_error, tracked_actor) if on_error else None
        self._ask(seat, "call", (seat.number, method_name, args or (), kwargs or {}), result, error)

    def _ask(
        self,
        seat: Seat,
        method: str,
        arguments: tuple[Any, ...],
        on_result: Callback | None,
        on_error: Callback | None,
    ) -> None:
        """Asks the process of a seat for something; told of is what comes back while it is of
        interest."""
        number = next(self.numbers)
        seat.tasks[number] = on_error
        tracked, lost = seat.process.taken[seat.number], seat.lost
        if lost is not None:
            self.late.append(lambda: self._fail(tracked, lost) if seat.tasks else None)
            return

        def result(_: TrackedActor, value: Any) -> None:
            if number in seat.tasks:
                del seat.tasks[number]
                if on_result:
                    on_result(value)

        def error(_: TrackedActor, why: Exception) -> None:
            if seat.tasks.pop(number, None):
                on_error(why)  # type: ignore[misc]

        self.inner.schedule_actor_task(
            seat.process.actor, method, arguments, on_result=result, on_error=error
        )
