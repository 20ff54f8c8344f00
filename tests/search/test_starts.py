"""The front of an earlier search as what is tried first."""

import logging

import pytest

from slimfront.search.record import starts
from slimfront.search.record.events import NetworkMeasured, TrialBegan
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.starts import starting_values
from tests.search.test_ledger import end, ledger
from tests.search.test_preflight import small


def earlier(**values: object) -> Ledger:
    book = ledger()
    book.apply(TrialBegan(number=0, values=values, seed=0))
    measures = {"val_accuracy": 0.9, "nonzero_params": 10}
    book.apply(NetworkMeasured(number=0, epoch=1, measures=measures, compaction=[], checkpoint="c"))
    end(book, 0)
    return book


@pytest.mark.parametrize(
    ("values", "taken", "said"),
    [
        ({"training.lr": 2e-3}, [{"training.lr": 2e-3}], []),
        (
            {"training.lr": 2e-3, "model.depth": 3},
            [{"training.lr": 2e-3}],
            [
                "search.start_from: old varied what does not vary here, and that is left out: "
                "model.depth"
            ],
        ),
        (
            {"model.depth": 3},
            [],
            [
                "search.start_from: old varied what does not vary here, and that is left out: "
                "model.depth",
                "search.start_from: nothing is taken from the front of old",
            ],
        ),
    ],
)
def test_what_is_not_taken_is_said(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, object],
    taken: list[dict[str, object]],
    said: list[str],
) -> None:
    config = small(search={"start_from": "old"})
    monkeypatch.setattr(starts, "read_search", lambda *_: (config, earlier(**values)))
    with caplog.at_level(logging.WARNING):
        assert starting_values(config) == taken
    assert caplog.messages == said
