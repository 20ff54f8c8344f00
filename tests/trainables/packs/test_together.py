"""Trainings in threads of one process: they take their epochs in packs, and none waits for what
does not come."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.packs import best_size
from slimfront.trainables.packs.stack import Stack
from slimfront.trainables.packs.together import Left, SharedProcess, Together
from slimfront.trainables.training.loop import Training
from tests.trainables.packs.made import candidates, trained_alone

pytestmark = pytest.mark.timeout(60)


def at_once(together: Together, *work: Callable[[], None]) -> None:
    """Runs each in a thread within `call`; none goes on before all are under way."""

    def run(one: Callable[[], None]) -> None:
        with together.call():
            one()

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    with together.turn:
        for thread in threads:
            thread.start()
        while together.calls < len(threads):
            time.sleep(0.001)
    for thread in threads:
        thread.join()


def epochs_of(
    together: Together, training: Training, count: int, found: dict[Training, Any]
) -> Callable[[], None]:
    def take() -> None:
        try:
            found[training] = [together.run_epoch(training) for _ in range(count)]
        except (TrialFailure, Left) as reason:
            found[training] = reason

    return take


def test_they_train_together_and_who_reports_is_not_waited_for() -> None:
    together, found = Together(), {}
    wanted = [trained_alone(candidate, 4)[1] for candidate in candidates(3)]
    trainings = [Training(candidate) for candidate in candidates(3)]
    at_once(together, *(epochs_of(together, training, 2, found) for training in trainings))
    assert together.sizes == {3: 2}
    with together.call():
        together.leave(trainings[0])  # it reports
    first = dict(found)
    at_once(together, *(epochs_of(together, training, 1, found) for training in trainings[1:]))
    assert together.sizes == {3: 2, 2: 1}
    for training in trainings[1:]:
        first[training] += found[training]
    at_once(together, *(epochs_of(together, training, 1, found) for training in trainings))
    assert together.sizes == {3: 3, 2: 1}
    for training, metrics in zip(trainings, wanted, strict=True):
        for one, other in zip(first[training] + found[training], metrics, strict=False):
            assert one == pytest.approx(other, rel=1e-6)
    assert [training.epoch for training in trainings] == [3, 4, 4]


def test_other_architectures_train_in_packs_of_their_own_and_what_does_not_pack_alone() -> None:
    together, found = Together(), {}
    small, large = candidates(2), candidates(2, model={"name": "mlp", "depth": 2, "width": 5})
    halving = candidates(1, out_of_memory="halve")
    trainings = [Training(candidate) for candidate in (*small, *large, *halving)]
    at_once(together, *(epochs_of(together, training, 1, found) for training in trainings))
    assert together.sizes == {2: 2}
    assert all(training.epoch == 1 for training in trainings)


def test_one_that_fails_leaves_the_others_alone() -> None:
    together, found = Together(), {}
    trainings = [
        Training(candidate)
        for candidate in candidates(
            3, options=[{}, {"training": {"lr": 1e200}}, {}], optimizer="sgd"
        )
    ]
    at_once(together, *(epochs_of(together, training, 3, found) for training in trainings))
    assert isinstance(found[trainings[1]], TrialFailure)
    assert [len(found[trainings[n]]) for n in (0, 2)] == [3, 3]


def test_an_error_reaches_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("out of luck")

    together, found = Together(), {}
    trainings = [Training(candidate) for candidate in candidates(2)]
    monkeypatch.setattr("slimfront.trainables.packs.pack.Pack.run_epoch", breaks)

    def take(training: Training) -> None:
        try:
            together.run_epoch(training)
        except RuntimeError as error:
            found[training] = str(error)

    at_once(together, *(lambda training=training: take(training) for training in trainings))
    assert list(found.values()) == ["out of luck"] * 2


def test_who_is_taken_away_while_it_waits_is_told() -> None:
    together, found = Together(), {}
    staying, going = (Training(candidate) for candidate in candidates(2))

    def take_away() -> None:
        while len(together.waiting) < 2:
            together.turn.wait(0.01)
        together.leave(going)

    at_once(
        together,
        epochs_of(together, staying, 1, found),
        epochs_of(together, going, 1, found),
        take_away,
    )
    assert isinstance(found[going], Left)
    assert going.epoch == 0
    assert staying.epoch == 1


class Trainable:
    """What the process needs of a trainable."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False

    def get_current_ip_pid(self) -> str:
        return "here"

    def greet(self, whom: str, mark: str = "") -> str:
        return f"{self.name}: hello {whom}{mark}"

    def stop(self) -> None:
        raise ValueError("stopped") if self.name == "b" else AssertionError


def test_a_shared_process_calls_the_trainable_of_a_seat() -> None:
    process = SharedProcess(Trainable)
    process.create(1, {"name": "a"})
    process.create(2, {"name": "b"})
    assert process.call(1, "greet", ("you",), {"mark": "!"}) == "a: hello you!"
    assert process.slots[2].epoch_runner is process.together
    with process.together.turn:  # somebody works
        assert process.call(2, "get_current_ip_pid", (), {}) == "here"
    with pytest.raises(ValueError, match="stopped"):
        process.leave(2)
    assert list(process.slots) == [1]
    assert process.together.calls == 0


def test_the_best_size_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = candidates(1)[0]
    assert best_size(candidate, 1) == 1
    assert best_size(candidates(1, out_of_memory="halve")[0], 8) == 1
    # Of a step of 1 to 16: eight take twice as long as four.
    rounds = [[1.0, 1.2, 1.6, 3.1, 9.0] for _ in range(5)]
    rounds[0][2] = rounds[1][3] = rounds[4][4] = 99.0  # something else kept the machine busy
    tried = [9.0] * 4  # whether there is room
    times = iter([1.0, *tried, *itertools.chain(*rounds)])
    monkeypatch.setattr("slimfront.trainables.packs.calibrate._LONG_S", 2.0)
    monkeypatch.setattr(
        "slimfront.trainables.packs.calibrate.seconds_of", lambda take, _: (take(), next(times))[1]
    )
    assert best_size(candidate, 16) == 4
    assert next(times, None) is None
    times = iter([3.0])
    assert best_size(candidate, 16) == 1  # its steps are long alone
    times = iter([1.0, 1.2, 1.6, *[1.0, 1.2] * 5])

    def packed(members: list[Training], _: object) -> float:
        if len(members) > 2:
            raise torch.OutOfMemoryError("a pack of four")
        return next(times)

    monkeypatch.setattr("slimfront.trainables.packs.calibrate._packed", packed)
    assert best_size(candidate, 16) == 2


def test_measuring_the_best_size_takes_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each step is taken, and as if it took as long however many train in it.
    monkeypatch.setattr(
        "slimfront.trainables.packs.calibrate.seconds_of", lambda take, _: (take(), 0.01)[1]
    )
    state, seen = torch.get_rng_state(), []
    train_step = Stack.train_step

    def noted(stack: Stack, *arguments: Any) -> Any:
        seen.append((len(stack.members), torch.get_num_threads()))
        return train_step(stack, *arguments)

    monkeypatch.setattr(Stack, "train_step", noted)
    assert best_size(candidates(1)[0], 4, threads=2) == 4
    assert set(seen) == {(2, 2), (4, 2)}
    assert torch.get_num_threads() == 1
    assert torch.equal(state, torch.get_rng_state())
