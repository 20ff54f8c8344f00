"""Real searches in spaces of few candidates, with conditions, and from values of other spaces."""

import logging
from pathlib import Path
from typing import Any

import pytest

from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record.events import ProposalRepeated, TrialBegan
from slimfront.search.record.journal import read_events
from slimfront.search.record.ledger import SearchResult
from slimfront.search.record.study import rebuild_study
from tests.conftest import small_config
from tests.search.searches import runs_of, study_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(180)]

SPACE: dict[str, Any] = {
    "sparsifier": {
        "choices": [
            {"name": "magnitude", "sparsity": 0.8},
            {"name": "rigl", "sparsity": 0.9, "every": 1},
        ]
    },
    "sparsifier.drop": {"choices": [0.2, 0.4], "when": {"sparsifier.name": "rigl"}},
}
MAGNITUDE = {"sparsifier": "{name: magnitude, sparsity: 0.8}"}
RIGL = "{every: 1, name: rigl, sparsity: 0.9}"
ALL = [
    MAGNITUDE,
    {"sparsifier": RIGL, "sparsifier.drop": 0.2},
    {"sparsifier": RIGL, "sparsifier.drop": 0.4},
]


def few(directory: Path, **search: Any) -> Config:
    return small_config(directory, space=SPACE, search={"trials": 12, **search})


def trained(result: SearchResult) -> list[dict[str, Any]]:
    return sorted((record.values for record in result.ledger.trials), key=str)


def check_told(directory: Path, result: SearchResult) -> None:
    """Every proposal is told the objectives of the trial that has its values."""
    by_values = {str(r.values): list(r.measures.values()) for r in result.ledger.trials}
    for trial in study_of(directory, result).trials:
        record = next(r for r in result.ledger.trials if r.values == trial.params)
        assert trial.values == [
            record.measures["val_accuracy"],
            record.measures["nonzero_params"],
        ]
    assert len(by_values) == len(result.ledger.trials)


def test_an_exhausted_space_ends_the_search_with_a_sentence_and_trains_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = "all 3 combinations of the space were tried"
    starts = [MAGNITUDE, {"sparsifier": {"name": "magnitude", "sparsity": 0.8}}]
    with caplog.at_level(logging.WARNING):
        result = run_search(few(tmp_path, start_from=starts), name="few")
    assert trained(result) == sorted(ALL, key=str)
    assert [one.message for one in caplog.records if sentence in one.message] != []
    check_told(tmp_path, result)
    events = list(read_events(tmp_path / "runs" / "few" / "journal.jsonl"))
    repeats = [event for event in events if isinstance(event, ProposalRepeated)]
    assert len(repeats) == len(result.ledger.repeated) > 0
    assert sum(isinstance(event, TrialBegan) for event in events) == 1 + 3
    # MLflow has a run for each that was trained, with the values that apply.
    _, children = runs_of(tmp_path, result)
    assert len(children) == 1 + 3
    for record in result.ledger.trials:
        params = children[record.label].data.params
        assert params["sparsifier"] == record.values["sparsifier"]
        assert ("sparsifier.drop" in params) == ("sparsifier.drop" in record.values)

    caplog.clear()
    runs = str(tmp_path / "runs")
    assert rebuild_study("few", runs) == 3
    again = resume_search("few", ["search.trials=20"], storage_path=runs)
    assert trained(again) == trained(result)
    assert len(again.ledger.repeated) == len(repeats)
    assert [one.message for one in caplog.records if sentence in one.message] != []
    check_told(tmp_path, again)


@pytest.mark.slow
def test_the_front_of_a_wider_space_is_tried_with_a_warning_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {
        "training.lr": {"low": 0.01, "high": 1},
        "training.optimizer": {"choices": ["adam", "sgd"]},
    }
    start = [{"training.lr": 0.02, "training.optimizer": "adam"}]
    search = {"trials": 1, "start_from": start}
    run_search(small_config(tmp_path, space=wide, search=search), name="wide")
    narrow = {
        "training.lr": {"low": 0.001, "high": 0.01},
        "training.optimizer": {"choices": ["adamw", "sgd"]},
    }
    with caplog.at_level(logging.WARNING):
        result = run_search(
            small_config(tmp_path, space=narrow, search={"trials": 1, "start_from": "wide"}),
            name="narrow",
        )
    (record,) = result.ledger.trials
    assert record.values["training.lr"] == 0.02
    assert record.values["training.optimizer"] in ("adamw", "sgd")
    told = [one.message for one in caplog.records if one.message.startswith("search.start_from")]
    assert told == [
        "search.start_from: trial-000 of wide has training.lr = 0.02, which is outside of what the "
        "space varies in (0.001 to 0.01); it is tried all the same",
        "search.start_from: trial-000 of wide has training.optimizer = 'adam', which is outside of "
        "what the space varies in (adamw, sgd); one that the space has is drawn instead",
    ]
    # The study is made anew with what lies outside.
    runs = str(tmp_path / "runs")
    assert rebuild_study("narrow", runs) == 1
    again = resume_search("narrow", storage_path=runs)
    (trial,) = study_of(tmp_path, again).trials
    assert trial.params == record.values
    assert trial.values is not None
