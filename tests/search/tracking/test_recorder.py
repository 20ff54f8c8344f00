"""The recorder against a real SQLite store, and against one that breaks."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from search.config import Config
from search.objectives import OBJECTIVES
from search.records import Ledger, SearchResult, TrialRecord
from search.tracking import Recorder, connect
from search.tracking.store import open_experiment
from trainables.errors import UserError


def ledger_with(record: TrialRecord) -> Ledger:
    ledger = Ledger([OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]], {"nonzero_params": 1000})
    ledger.add(record)
    return ledger


def finished_record() -> TrialRecord:
    return TrialRecord(0, {"a.b": 0.5}, 7, "completed", measures={"val_accuracy": 0.9, "nonzero_params": 100, "params": 200})


def test_a_trial_is_recorded_with_params_metrics_tags_and_status(config: Config, tmp_path: Path) -> None:
    client = connect(config.tracking.uri)
    recorder = Recorder(client, config, "search-1", tmp_path / "artifacts")
    record = finished_record()
    recorder.start_trial(record)
    recorder.log_epochs(record, [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}])
    recorder.end_trial(record, ledger_with(record))
    recorder.close()
    assert record.run_id is not None
    run = client.get_run(record.run_id)
    assert run.data.params == {"a.b": "0.5", "seed": "7"}
    assert run.data.metrics["val_accuracy"] == 0.9
    assert [(m.step, m.value) for m in client.get_metric_history(record.run_id, "epoch/train_loss")] == [(1, 2.0), (2, 1.0)]
    assert run.data.tags["slimfront.trial"] == "trial-000"
    assert run.data.tags["slimfront.status"] == "completed"
    assert run.info.status == "FINISHED"


def test_a_store_that_breaks_in_the_middle_costs_one_warning_and_no_trial(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(config.tracking.uri)
    recorder = Recorder(client, config, "search-1", tmp_path / "artifacts")
    recorder.writer.submit(lambda: None).result()

    def dead(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("the server is gone")

    for name in ("create_run", "log_batch", "log_text", "set_terminated"):
        monkeypatch.setattr(client, name, dead)
    record = finished_record()
    ledger = ledger_with(record)
    recorder.start_trial(record)
    recorder.log_epochs(record, [{"epoch": 1, "train_loss": 2.0}])
    recorder.end_trial(record, ledger)
    recorder.finish(SearchResult("search-1", ledger, ledger.front(), 1.0, config.tracking.uri, interrupted=False))
    warnings = [r.getMessage() for r in caplog.records if "MLflow did not take a write" in r.getMessage()]
    assert len(warnings) == 1
    assert "the server is gone" in warnings[0]


def test_an_experiment_is_made_once_and_found_again(config: Config, tmp_path: Path) -> None:
    client = connect(config.tracking.uri)
    first = open_experiment(client, "mine", tmp_path / "artifacts", config.tracking.uri)
    assert open_experiment(client, "mine", tmp_path / "artifacts", config.tracking.uri) == first
    assert client.get_experiment(first).artifact_location == (tmp_path / "artifacts").as_uri()


def test_a_deleted_experiment_is_refused_with_the_way_out(config: Config, tmp_path: Path) -> None:
    client = connect(config.tracking.uri)
    client.delete_experiment(open_experiment(client, "mine", tmp_path, config.tracking.uri))
    with pytest.raises(UserError, match=r"'mine' is deleted; restore it, or set tracking\.experiment"):
        open_experiment(client, "mine", tmp_path, config.tracking.uri)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        connect(f"sqlite:///{tmp_path}/broken.db")
    assert isinstance(connect(f"sqlite:///{tmp_path}/fine.db"), MlflowClient)


def test_a_dead_server_is_given_up_on_so_that_the_end_does_not_wait(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(config.tracking.uri)
    recorder = Recorder(client, config, "search-1", tmp_path / "artifacts")
    recorder.writer.submit(lambda: None).result()
    attempts: list[int] = []

    def dead(*_args: Any, **_kwargs: Any) -> None:
        attempts.append(1)
        raise ConnectionError("the server is gone")

    for name in ("create_run", "log_batch"):
        monkeypatch.setattr(client, name, dead)
    for _ in range(50):
        recorder.start_trial(finished_record())
    recorder.close()
    assert len(attempts) == 3
    assert recorder.failed_writes == 3
