"""Whom a training takes its epochs with: nobody, or the others of its process, in packs."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.packs.pack import Pack
from slimfront.trainables.packs.packable import pack_key
from slimfront.trainables.training.finishing import Number
from slimfront.trainables.training.loop import Training

Result = dict[str, Number] | Exception
"""The metrics of an epoch, or why there are none."""
Results = dict[Training, Result]


class Alone:
    """Nobody: each training takes its epochs by itself."""

    def run_epoch(self, training: Training) -> dict[str, Number]:
        """`Training.run_epoch`, and what it raises."""
        return training.run_epoch()

    def leave(self, training: Training) -> None:
        """Called before anything but an epoch is done with the training: from then on its tensors
        are its own."""


class Left(Exception):
    """The training was taken away while it waited for its epoch."""


class Together(Alone):
    """The trainings of one process, each in a thread of its own, one of which works at a time.

    When all calls that are under way wait for an epoch, one thread trains it for all of them: in a
    pack for each key, and alone those that do not pack. What is not under way then (a report that
    is with the driver) is not waited for.
    """

    def __init__(self) -> None:
        self.turn = threading.Condition()
        """Held by the thread that works; who waits for an epoch lets go of it."""
        self.count = threading.Lock()
        self.calls = 0
        self.waiting: list[Training] = []
        self.results: Results = {}
        self.packs: dict[str, Pack] = {}
        self.sizes: Counter[int] = Counter()
        """How many epochs were trained by so many together."""

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around all that a thread does here."""
        with self.count:
            self.calls += 1
        try:
            with self.turn:
                yield
        finally:
            with self.count:
                self.calls -= 1
            with self.turn:
                self.turn.notify_all()

    def run_epoch(self, training: Training) -> dict[str, Number]:
        """The metrics of the training's next epoch, once it was trained with others; within `call`.

        Raises:
            TrialFailure: if its loss is not finite.
            Left: if `leave` was called meanwhile.
        """
        with self.turn:
            self.waiting.append(training)
            while training not in self.results:
                if len(self.waiting) == self.calls:
                    self._run()
                    self.turn.notify_all()
                else:
                    self.turn.wait()
            result = self.results.pop(training)
        if isinstance(result, Exception):
            raise result
        return result

    def leave(self, training: Training) -> None:
        """Takes a training out of its pack, and out of the queue for the next epoch."""
        with self.turn:
            for pack in self.packs.values():
                if training in pack.members:
                    pack.leave(training)
            if training in self.waiting:
                self.waiting.remove(training)
                self.results[training] = Left()
                self.turn.notify_all()

    def _run(self) -> None:
        """Trains all that wait for one epoch."""
        groups: dict[str, list[Training]] = {}
        for training in self.waiting:
            key = pack_key(training.candidate)
            groups.setdefault(key, []).append(training)
        self.waiting = []
        for key, group in groups.items():
            try:
                self.results |= self._epochs(key, group)
            except Exception as error:  # of any kind: whoever waits must hear of it
                self.results |= dict.fromkeys(group, error)

    def _epochs(self, key: str, group: list[Training]) -> Results:
        """Trains one epoch of trainings of one key."""
        pack = self.packs.get(key)
        if pack is None:
            pack = Pack(device=group[0].device)
            self.packs[key] = pack
        for member in list(pack.members):
            if member not in group:
                pack.leave(member)
        alone = []
        for training in group:
            if training not in pack.members and not _joins(pack, training):
                alone.append(training)
        self.sizes[len(pack.members)] += 1
        results: Results = {**pack.run_epoch()}
        for training in alone:
            results[training] = _epoch_alone(training)
        return results


def _joins(pack: Pack, training: Training) -> bool:
    try:
        pack.join(training)
    except UserError:
        return False
    return True


def _epoch_alone(training: Training) -> Result:
    try:
        return training.run_epoch()
    except TrialFailure as failure:
        return failure


_AT_ONCE = {"get_auto_filled_metrics", "get_current_ip_pid", "save"}
"""What Ray Tune asks of a trainable that disturbs nobody: a training that is saved has left its
pack when it reported."""


class SharedProcess:
    """Runs the trainables of several trials, one in each of its slots; its methods are called in
    threads of their own."""

    def __init__(self, trainable: type) -> None:
        """`trainable` makes one for each trial, and uses its attribute `epoch_runner` as
        `CandidateTrainable` does."""
        self.trainable = trainable
        self.together = Together()
        self.slots: dict[int, Any] = {}

    def create(self, slot: int, arguments: dict[str, Any]) -> None:
        """Makes the trainable of a slot."""
        with self.together.call():
            trainable = self.trainable(**arguments)
            self.slots[slot] = trainable
            trainable.epoch_runner = self.together

    def call(
        self, slot: int, method: str, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """What a method of a slot's trainable returns."""
        turn: AbstractContextManager[None] = (
            nullcontext() if method in _AT_ONCE else self.together.call()
        )
        with turn:
            bound = getattr(self.slots[slot], method)
            return bound(*arguments, **named)

    def leave(self, slot: int) -> None:
        """Ends the trainable of a slot."""
        with self.together.call():
            self.slots.pop(slot).stop()
