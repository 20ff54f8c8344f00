"""Which network is recommended where that is decided by times, which are noisy."""

from collections.abc import Mapping
from typing import Any

import pytest

from slimfront.search.config.objectives import OBJECTIVES
from slimfront.search.engine.finished import ending
from slimfront.search.record.events import NetworkMeasured, NetworkTimed, TrialBegan
from slimfront.search.record.ledger import Ledger

ACCURACY = OBJECTIVES["val_accuracy"]


def book_of(networks: Mapping[int, tuple[float, float, int]]) -> Ledger:
    """A ledger of networks by number: accuracy, speed-up while trials ran, and weights."""
    dense = {"val_accuracy": 0.98, "speedup": 1.0, "nonzero_params": 1000.0, "params": 1000.0}
    objectives = [ACCURACY, OBJECTIVES["speedup"]]
    ledger = Ledger(objectives, dense, quality=ACCURACY, tolerance=0.02)
    measured: list[tuple[int | None, dict[str, float]]] = [(None, dense)]
    for number, (accuracy, speedup, weights) in networks.items():
        sizes = {"nonzero_params": float(weights), "params": float(weights)}
        measured.append((number, {"val_accuracy": accuracy, "speedup": speedup} | sizes))
    for number, measures in measured:
        ledger.apply(TrialBegan(number=number, values={}, seed=0))
        ledger.apply(
            NetworkMeasured(
                number=number, epoch=1, measures=measures, compaction=[], checkpoint="c"
            )
        )
    return ledger


def recommended(ledger: Ledger) -> int | None:
    chosen = ledger.front.recommended()
    assert chosen is not None
    return chosen.trial.number


def in_quiet(ledger: Ledger, number: int, *speedups: float) -> None:
    each = [{"speedup": speedup} for speedup in speedups]
    mean = sum(speedups) / len(speedups)
    ledger.apply(NetworkTimed(number=number, epoch=1, times={"speedup": mean}, each=each))


NETWORKS = {0: (0.97, 2.4, 300), 1: (0.975, 2.3, 100), 2: (0.98, 1.5, 200), 3: (0.5, 9.0, 5)}


def test_by_the_times_of_the_search_until_there_are_others() -> None:
    assert recommended(book_of(NETWORKS)) == 0


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ((2.4, 2.41), (2.3, 2.31), 0),  # apart by more than their noise
        ((2.4, 2.2), (2.2, 2.36), 1),  # equally fast, and the second has fewer weights
        ((1.9, 1.91), (2.3, 2.31), 1),  # the search was mistaken
    ],
)
def test_what_is_no_slower_but_for_noise_is_chosen_by_its_weights(
    first: tuple[float, float], second: tuple[float, float], chosen: int
) -> None:
    ledger = book_of(NETWORKS)
    in_quiet(ledger, 0, *first)
    in_quiet(ledger, 1, *second)
    in_quiet(ledger, 2, 1.5, 1.52)
    assert recommended(ledger) == chosen


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The networks whose times are taken at the end, in that order."""
    numbers: list[int] = []

    def times(_config: object, point: Any) -> dict[str, float]:
        numbers.append(point.trial.number)
        return {"speedup": 2.0 + len(numbers)}

    monkeypatch.setattr(ending, "_times", times)
    return numbers


def test_all_that_may_be_the_fastest_are_timed_twice_and_none_again(asked: list[int]) -> None:
    ledger = book_of(NETWORKS)
    config: Any = None
    ending.time_again(config, ledger, ledger.apply)
    assert asked == [0, 1, 2, 2, 1, 0]  # not the third, which nobody would ship
    point = ledger.front.members()[0]
    assert point.timed_again == {"speedup": 5.5}
    ending.time_again(config, ledger, ledger.apply)
    assert len(asked) == 6


def test_where_sizes_decide_what_is_recommended_is_timed_alone(asked: list[int]) -> None:
    ledger = book_of(NETWORKS)
    ledger.front.objectives = [ACCURACY, OBJECTIVES["nonzero_params"], OBJECTIVES["speedup"]]
    config: Any = None
    ending.time_again(config, ledger, ledger.apply)
    assert asked == [1]
