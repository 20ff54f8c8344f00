"""The recorder against a real SQLite store, and against one that breaks."""

import importlib
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from slimfront.search.config.schema import Config
from slimfront.search.record import fencing
from slimfront.search.record.events import KINDS, Event
from slimfront.search.record.fencing import Fence
from slimfront.search.tracking import recorder, write_queue
from slimfront.search.tracking.page import Page
from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.store import connect, open_experiment
from slimfront.trainables.data import DATA, load_once
from slimfront.trainables.errors import UserError
from tests.marks import often
from tests.search.clusters import wait_for

MEASURES = {
    "val_accuracy": 0.9,
    "nonzero_params": 100,
    "params": 200,
    "layers": 2,
    "flops": 400,
    "bytes": 900,
}
_time = itertools.count(1_700_000_000_000)


def event(kind: str, **content: Any) -> Event:
    return KINDS[kind](time=next(_time), **content)


def story(trials: int = 1) -> list[Event]:
    """The journal of a small search from its beginning to its end."""
    sizes = dict.fromkeys(MEASURES, 1000.0)
    events = [event("begun", search="search-1", dense_sizes=sizes), event("session", session=1)]
    for number in range(trials):
        events.append(event("trial", number=number, values={"a.b": 0.5}, seed=7))
        history = [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]
        events.append(event("epochs", number=number, history=history))
        events.append(
            event(
                "point",
                number=number,
                epoch=2,
                measures=MEASURES,
                compaction=[],
                checkpoint="somewhere",
            )
        )
        events.append(event("ended", number=number, status="completed", reason=None))
    events.append(event("tested", number=0, epoch=2, metrics={"test_accuracy": 0.8}))
    return [*events, event("finished", status="completed", seconds=1.0)]


def record(
    client: MlflowClient, config: Config, directory: Path, events: list[Event], earlier: int = 0
) -> Recorder:
    """A recorder that was handed all events, the first `earlier` of them as those of an earlier
    session."""
    directory.mkdir(exist_ok=True)
    made = Recorder(client, config, "search-1", directory, events[:earlier])
    for one in events[earlier:]:
        made.take(one)
    return made


def runs(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    by_label = {run.data.tags.get("slimfront.trial", ""): run for run in found}
    assert len(by_label) == len(found), "a run is there twice"
    return by_label


def check_story(client: MlflowClient, trials: int = 1) -> None:
    """Everything of `story` is in MLflow, once."""
    found = runs(client)
    assert set(found) == {"", *(f"trial-{n:03d}" for n in range(trials))}
    assert found[""].info.status == "FINISHED"
    assert found[""].data.metrics["trials_completed"] == trials
    for number in range(trials):
        run = found[f"trial-{number:03d}"]
        assert run.data.params == {"a.b": "0.5", "seed": "7"}
        assert run.data.metrics["val_accuracy"] == 0.9
        assert run.data.tags["slimfront.status"] == "completed"
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "epoch/train_loss")
        assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
        assert len(client.get_metric_history(run.info.run_id, "val_accuracy")) == 1
    assert found["trial-000"].data.tags["slimfront.front"] == "true"
    assert found["trial-000"].data.metrics["test_accuracy"] == 0.8
    assert len(client.get_metric_history(found[""].info.run_id, "hypervolume")) == trials
    names = {file.path for file in client.list_artifacts(found[""].info.run_id)}
    assert names == {
        "config.yaml",
        "environment.txt",
        "front.json",
        "front.png",
        "front.html",
        "history.png",
    }


def test_a_search_is_recorded_with_params_metrics_tags_and_status(
    config: Config, tmp_path: Path
) -> None:
    client = connect(config.tracking.uri)
    assert record(client, config, tmp_path / "search-1", story()).close()
    check_story(client)


@pytest.mark.parametrize("earlier", often(range(9), 0, 4, 7))
def test_a_recorder_that_takes_over_after_any_event_doubles_nothing(
    config: Config, tmp_path: Path, earlier: int
) -> None:
    client, events, directory = connect(config.tracking.uri), story(), tmp_path / "search-1"
    assert record(client, config, directory, events[:earlier]).close()
    assert record(client, config, directory, events, earlier).close()
    check_story(client)


@pytest.mark.parametrize("lost", often([1, 3, 9], 3))
def test_events_written_again_because_the_mark_was_lost_double_nothing(
    config: Config, tmp_path: Path, lost: int
) -> None:
    client, events, directory = connect(config.tracking.uri), story(), tmp_path / "search-1"
    assert record(client, config, directory, events).close()
    (directory / recorder.DELIVERED_FILE).write_text(str(len(events) - lost))
    assert record(client, config, directory, events, len(events)).close()
    check_story(client)


def test_a_driver_that_lost_its_search_writes_nothing_over_what_the_next_one_wrote(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 1.0)
    monkeypatch.setattr(write_queue, "_COLLECT_S", 0.0)
    database, client = f"sqlite:///{tmp_path}/study.db", connect(config.tracking.uri)
    first, second = (Fence(database, "search-1", name) for name in ("first", "second"))
    first.take()
    events = story()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    stopped = Recorder(client, config, "search-1", tmp_path / "one", events[:3], None, first.check)
    while stopped.delivered < 3:
        time.sleep(0.01)
    assert first.keeper is not None
    first.closing.set()
    first.keeper.join()  # it stands still past its lease
    second.take()
    there = Recorder(client, config, "search-1", tmp_path / "two", events, None, second.check)
    assert there.close()
    begun = time.monotonic()
    stopped.take(event("epochs", number=0, history=[{"epoch": 3, "train_loss": 9.0}]))
    stopped.take(event("interrupted", number=0))
    stopped.take(event("finished", status="interrupted", seconds=1.0))
    assert not stopped.close()
    assert time.monotonic() - begun < 5
    check_story(client)
    second.release()


def break_store(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> tuple[threading.Event, threading.Semaphore]:
    """Makes every write of the client fail until the event that it returns is set; the semaphore
    is released for each that failed."""
    well, failed = threading.Event(), threading.Semaphore(0)
    for name in (
        "create_run",
        "log_batch",
        "log_text",
        "log_dict",
        "log_artifact",
        "set_tag",
        "set_terminated",
        "update_run",
    ):
        real = getattr(client, name)

        def write(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            if not well.is_set():
                failed.release()
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(client, name, write)
    return well, failed


def test_a_store_that_is_dead_for_a_while_costs_one_warning_and_nothing_else(
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE_S", (0.02, 0.05))
    client, events = connect(config.tracking.uri), story(trials=3)
    made = record(client, config, tmp_path / "search-1", events[:4])
    wait_for(lambda: made.delivered == 4, 60)
    well, failed = break_store(client, monkeypatch, ConnectionError("the server is gone"))
    for one in events[4:]:
        made.take(one)
    for _ in range(3):  # it is tried again, without another warning
        assert failed.acquire(timeout=60)
    well.set()
    assert made.close()
    check_story(client, trials=3)
    warnings = [r.getMessage() for r in caplog.records if "the server is gone" in r.getMessage()]
    assert len(warnings) == 1
    assert "as soon as MLflow can" in warnings[0]


def test_a_store_that_never_comes_back_does_not_hold_up_the_end_and_is_filled_later(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE_S", (0.02, 0.05))
    monkeypatch.setattr(recorder, "_GRACE_S", 0.3)
    client, events, directory = connect(config.tracking.uri), story(trials=2), tmp_path / "search-1"
    made = record(client, config, directory, [])
    with monkeypatch.context() as broken:
        break_store(client, broken, ConnectionError("the server is gone"))
        for one in events:
            made.take(one)
        started = time.monotonic()
        assert not made.close()
        assert time.monotonic() - started < 5
    assert record(client, config, directory, events, len(events)).close()
    check_story(client, trials=2)


def test_a_write_that_mlflow_refuses_for_good_is_skipped_with_a_warning(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, events = connect(config.tracking.uri), story()
    events.insert(3, event("epochs", number=0, history=[{"epoch": 3, "no*such*name": 1.0}]))
    assert record(client, config, tmp_path / "search-1", events).close()
    assert "MLflow refused 1 values of trial-000" in caplog.text
    check_story(client)


def test_a_picture_that_cannot_be_drawn_is_left_out_with_a_warning(
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("cannot write empty image")

    monkeypatch.setattr("slimfront.search.tracking.charts.history_png", fails)
    client = connect(config.tracking.uri)
    assert record(client, config, tmp_path / "search-1", story()).close()
    assert "the picture history.png cannot be made (cannot write empty image)" in caplog.text
    parent = runs(client)[""]
    assert parent.info.status == "FINISHED"
    assert "front.png" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_only_what_mlflow_cannot_take_is_left_out_of_a_batch(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, events = connect(config.tracking.uri), story()[:3]
    history = [{"epoch": epoch, "fine": 1.0, "no*such*name": 1.0} for epoch in range(1, 31)]
    events.append(event("epochs", number=0, history=history))
    assert record(client, config, tmp_path / "search-1", events).close()
    found = runs(client)["trial-000"]
    assert len(client.get_metric_history(found.info.run_id, "epoch/fine")) == 30
    assert "refused 30 values of trial-000" in caplog.text


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_trial_that_was_interrupted_and_continued_before_mlflow_heard_of_it_runs(
    config: Config, tmp_path: Path, lost: int
) -> None:
    client, directory = connect(config.tracking.uri), tmp_path / "search-1"
    events = [
        *story()[:3],
        event("interrupted", number=0),
        event("finished", status="interrupted", seconds=1.0),
    ]
    assert record(client, config, directory, events[: len(events) - lost]).close()
    later = [event("session", session=2), event("continued", number=0)]
    assert record(client, config, directory, events + later, len(events)).close()
    assert {run.info.status for run in runs(client).values()} == {"RUNNING"}


def test_the_last_of_several_states_of_a_trial_counts_where_mlflow_hears_of_all_at_once(
    config: Config, tmp_path: Path
) -> None:
    client = connect(config.tracking.uri)
    events = [
        *story()[:3],
        event("interrupted", number=0),
        event("finished", status="interrupted", seconds=1.0),
    ]
    events += [event("session", session=2), event("continued", number=0)]
    events += [
        event("ended", number=0, status="completed", reason=None),
        event("finished", status="completed", seconds=2.0),
    ]
    assert record(client, config, tmp_path / "search-1", events, len(events)).close()
    found = runs(client)
    assert found["trial-000"].data.tags["slimfront.status"] == "completed"
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_a_short_trial_takes_three_calls(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, called = connect(config.tracking.uri), []
    made = record(client, config, tmp_path / "search-1", events := story(trials=3))
    for name in ("create_run", "log_batch", "set_terminated"):
        real = getattr(client, name)

        def call(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            called.append((args[0], name))
            return real(*args, **kwargs)

        monkeypatch.setattr(client, name, call)
    wait_for(lambda: made.delivered == len(events), 60)
    assert made.close()
    of_a_trial = [name for run_id, name in called if run_id == made.run_ids["trial-002"]]
    # The last has the tags of front and rank.
    assert of_a_trial == [
        "log_batch",
        "set_terminated",
        "log_batch",
    ]


def test_a_member_that_leaves_the_front_in_a_later_session_loses_its_tag(
    config: Config, tmp_path: Path
) -> None:
    client, events, directory = connect(config.tracking.uri), story(), tmp_path / "search-1"
    assert record(client, config, directory, events).close()
    better = MEASURES | {"val_accuracy": 0.95, "nonzero_params": 50}
    later = [
        event("session", session=2),
        event("trial", number=1, values={"a.b": 0.7}, seed=8),
        event("point", number=1, epoch=2, measures=better, compaction=[], checkpoint=None),
        event("ended", number=1, status="completed", reason=None),
        event("finished", status="completed", seconds=2.0),
    ]
    assert record(client, config, directory, events + later, len(events)).close()
    found = runs(client)
    assert found["trial-000"].data.tags["slimfront.front"] == "false"
    assert found["trial-001"].data.tags["slimfront.front"] == "true"


def test_an_interrupted_trial_is_killed_and_runs_again_when_it_is_continued(
    config: Config, tmp_path: Path
) -> None:
    client, events = connect(config.tracking.uri), story()[:3]
    events.append(event("interrupted", number=0))
    events.append(event("finished", status="interrupted", seconds=1.0))
    assert record(client, config, tmp_path / "search-1", events).close()
    assert {run.info.status for run in runs(client).values()} == {"KILLED"}
    later = [event("session", session=2), event("continued", number=0)]
    assert record(client, config, tmp_path / "search-1", events + later, len(events)).close()
    assert {run.info.status for run in runs(client).values()} == {"RUNNING"}


def test_an_experiment_is_made_once_and_found_again(config: Config, tmp_path: Path) -> None:
    client = connect(config.tracking.uri)
    first = open_experiment(client, "mine", tmp_path / "artifacts", config.tracking.uri)
    assert open_experiment(client, "mine", tmp_path / "artifacts", config.tracking.uri) == first
    assert client.get_experiment(first).artifact_location == (tmp_path / "artifacts").as_uri()


def test_a_deleted_experiment_is_refused_with_the_way_out(config: Config, tmp_path: Path) -> None:
    client = connect(config.tracking.uri)
    client.delete_experiment(open_experiment(client, "mine", tmp_path, config.tracking.uri))
    with pytest.raises(
        UserError, match=r"'mine' is deleted; restore it, or set tracking\.experiment"
    ):
        open_experiment(client, "mine", tmp_path, config.tracking.uri)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        connect(f"sqlite:///{tmp_path}/broken.db")
    assert isinstance(connect(f"sqlite:///{tmp_path}/fine.db"), MlflowClient)


def test_errors_of_mlflow_that_are_hopeless_are_known_by_their_code() -> None:
    assert MlflowException("x", error_code=1000).error_code in write_queue.PERMANENT_ERRORS


def test_the_use_of_the_machine_is_logged_on_the_parent_where_it_is_asked_for(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    client, events = connect(config.tracking.uri), story()
    made = record(client, config, tmp_path / "search-1", events[:2])
    made.watch_system()
    wait_for(lambda: "system/cpu_utilization_percentage" in runs(client)[""].data.metrics, 60)
    assert made.close()


@pytest.mark.parametrize("what", ["_log_data", "finish", "_log_front", "refresh"])
def test_an_error_of_our_own_is_one_warning_by_name_and_not_a_store_that_does_not_answer(
    what: str,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_arguments: Any, **_named: Any) -> None:
        raise RuntimeError("torch.export does not take this\nand 160 lines more")

    monkeypatch.setattr(Page, what, broken)
    client = connect(config.tracking.uri)
    made = record(client, config, tmp_path / "search-1", story())
    assert made.close()
    assert runs(client)[""].info.status == "FINISHED"
    assert runs(client)["trial-000"].data.tags["slimfront.status"] == "completed"
    warnings = [
        one.getMessage() for one in caplog.records if "it is not in MLflow" in one.getMessage()
    ]
    assert warnings
    assert all("torch.export does not take this" in one and "\n" not in one for one in warnings)
    assert "did not take a write" not in caplog.text


def test_models_that_cannot_be_made_are_named_one_by_one_and_the_search_ends(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    candidate = config.candidate({})
    data = load_once(candidate.data, torch.device("cpu"))
    network = candidate.model.build(data.input_shape, data.head)
    monkeypatch.setattr("slimfront.search.tracking.charts.load", lambda *_: network)

    def cannot(*_arguments: Any, **_named: Any) -> None:
        raise ValueError("this network branches on its inputs")

    monkeypatch.setattr(importlib.import_module("mlflow.pytorch"), "save_model", cannot)
    caplog.set_level("WARNING")  # that import silences the root logger
    client = connect(config.tracking.uri)
    assert record(client, config, tmp_path / "search-1", story()).close()
    assert runs(client)[""].info.status == "FINISHED"
    wanted = (
        "the model of trial-000 cannot be made (this network branches on its "
        "inputs): it is not in MLflow"
    )
    assert [one.getMessage() for one in caplog.records if "the model of" in one.getMessage()] == [
        wanted
    ]


def test_one_odd_key_costs_that_key_and_is_named_and_remembered(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a" * 300
    data = {
        "name": "factory",
        "factory": "tests.trainables.test_step_graphs:images",
        "args": {long: 1, "a#b;c": 2},
    }
    odd = config.model_copy(update={"data": DATA.parse_named(data)})
    client = connect(config.tracking.uri)
    made = record(client, odd, tmp_path / "search-1", story()[:2])
    assert made.close()
    params = runs(client)[""].data.params
    assert params["training.batch_size"] == "256"
    assert params["data.args.a_b_c"] == "2"
    assert f"data.args.{long}" not in params
    assert made.refused == [f"data.args.{long} of the search"]
    assert f"MLflow refused 1 values of the search: data.args.{long} (" in caplog.text
    again = record(client, odd, tmp_path / "search-1", story()[:2], 2)
    assert again.close()
    assert again.refused == made.refused


def test_what_is_written_to_a_run_that_was_deleted_is_named(config: Config, tmp_path: Path) -> None:
    client, events, directory = connect(config.tracking.uri), story(), tmp_path / "search-1"
    made = record(client, config, directory, events[:5])
    made.close()
    client.delete_run(made.run_ids["trial-000"])
    again = Recorder(client, config, "search-1", directory, events[:5])
    again.run_ids["trial-000"] = made.run_ids["trial-000"]
    for one in events[5:]:
        again.take(one)
    assert again.close()
    assert any("trial-000" in name for name in again.refused)


@pytest.mark.parametrize(
    "content", often(["", "x", "1.5", "-", "99999999999999999999x"], "", "1.5")
)
def test_a_damaged_mark_only_delivers_again(config: Config, tmp_path: Path, content: str) -> None:
    client, events, directory = connect(config.tracking.uri), story(), tmp_path / "search-1"
    assert record(client, config, directory, events).close()
    (directory / recorder.DELIVERED_FILE).write_text(content)
    assert record(client, config, directory, events, len(events)).close()
    check_story(client)
