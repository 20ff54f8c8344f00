"""What the driver makes of reports, without Ray: trials and results as Ray hands them over."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimfront.search.config.objectives import OBJECTIVES
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.engine.observer import Observer
from slimfront.search.record.events import NetworkMeasured
from slimfront.search.record.journal import JOURNAL_FILE, Journal, read_events
from slimfront.search.record.ledger import Ledger


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Observer]:
    ledger = Ledger(
        [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]],
        {"nonzero_params": 1000},
        place=str(tmp_path),
    )
    journal = Journal(tmp_path)
    recorder: Any = SimpleNamespace(take=lambda _event: None)
    yield Observer(journal, ledger, recorder, Interrupt(), None, relative=lambda path: path)
    journal.close()


def trial(number: int | None) -> Any:
    return SimpleNamespace(
        config={"number": number, "values": {}, "candidate": {"training": {"seed": 0}}},
        last_result={},
    )


def report(
    observer: Observer, reporting: Any, epoch: int, accuracy: float, size: float, **more: Any
) -> bool:
    """What Ray does with a report: it tells of it, and saves a checkpoint if it is asked to, which
    is said here."""
    result = {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "nonzero_params": size,
        "measured": ["val_accuracy", "nonzero_params"],
        "history": [{"epoch": epoch}],
        "done": False,
    }
    result |= more
    observer.on_trial_result(0, [], reporting, result)
    reporting.last_result = result
    asked = bool(result.get("should_checkpoint"))
    if asked:
        place = Path(observer.ledger.place, f"{reporting.config['number']}-{epoch}")
        place.mkdir()
        observer.on_checkpoint(0, [], reporting, SimpleNamespace(path=place.name))
    return asked


def pruned(accuracy: float, size: float) -> dict[str, Any]:
    return {
        "pruned": [
            {"measures": {"val_accuracy": accuracy, "nonzero_params": size}, "compaction": []}
        ]
    }


def test_a_report_is_kept_where_training_goes_on_or_a_network_of_it_joins_the_front(
    observer: Observer, tmp_path: Path
) -> None:
    first, second, third, dense = (trial(number) for number in (0, 1, 2, None))
    assert report(observer, first, 1, 0.5, 100)
    assert report(observer, first, 2, 0.9, 100, done=True)
    assert report(observer, second, 1, 0.1, 900)  # training goes on from there, whatever it is
    assert not report(observer, second, 2, 0.8, 200, done=True, **pruned(0.7, 150))
    # For what was pruned from it.
    assert report(observer, third, 1, 0.8, 200, done=True, **pruned(0.7, 50))
    assert report(observer, dense, 1, 0.1, 900, done=True)
    points = [
        event
        for event in read_events(tmp_path / JOURNAL_FILE)
        if isinstance(event, NetworkMeasured)
    ]
    assert [(p.number, p.epoch, p.checkpoint) for p in points] == [
        (0, 1, "0-1"),
        (0, 2, "0-2"),
        (1, 1, "1-1"),
        (1, 2, None),
        (2, 1, "2-1"),
        (None, 1, "None-1"),
    ]
    assert [point.name for point in observer.ledger.front.members()] == [
        "trial-000@2",
        "trial-002@1/1",
    ]
    second.last_result["finished"] = True
    observer.on_trial_complete(0, [], second)
    # What the study is told.
    assert observer.ledger.by_label["trial-001"].measures["nonzero_params"] == 200
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"0-2", "2-1", "None-1"}


def test_a_trial_whose_last_report_was_not_kept_can_still_go_on_from_the_one_before(
    observer: Observer, tmp_path: Path
) -> None:
    report(observer, trial(0), 1, 0.9, 100)
    unlucky = trial(1)
    report(observer, unlucky, 1, 0.5, 500)
    report(observer, unlucky, 2, 0.8, 200, done=True)  # here the driver dies
    again = Ledger(observer.ledger.objectives, {"nonzero_params": 1000}, place=str(tmp_path))
    for event in read_events(tmp_path / JOURNAL_FILE):
        again.apply(event)
    record = again.by_label["trial-001"]
    assert record.resumable is not None
    assert record.resumable.checkpoint == str(tmp_path / "1-1")
    assert Path(record.resumable.checkpoint).is_dir()
    # It ends a second time, and is in the journal once.
    assert not report(observer, unlucky, 2, 0.8, 200, done=True)
    points = [
        event
        for event in read_events(tmp_path / JOURNAL_FILE)
        if isinstance(event, NetworkMeasured)
    ]
    assert [(p.number, p.epoch) for p in points] == [(0, 1), (1, 1), (1, 2)]


def test_a_trial_that_fails_has_nothing_to_keep(observer: Observer) -> None:
    failing = trial(0)
    result = {"history": [], "failure": "diverged", "done": True}
    observer.on_trial_result(0, [], failing, result)
    assert "should_checkpoint" not in result
    assert observer.ledger.by_label["trial-000"].points == []
