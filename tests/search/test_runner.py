"""Real searches on a real Ray cluster, recorded in a real MLflow store."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from optuna.trial import TrialState

from slimfront import measure, train
from slimfront.search.config.schema import Config
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record.events import Event, TrialEnded
from slimfront.search.record.journal import Journal
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.shipping.network_file import restore
from tests.conftest import SMALL_CONFIG, small_config
from tests.search.searches import Kills, check_histories, runs_of, study_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(180)]


def test_every_trial_completes_and_the_front_is_not_dominated(
    finished: tuple[Path, SearchResult],
) -> None:
    _, result = finished
    assert len(result.ledger.with_status("completed")) == 6
    assert any(point.step for point in result.front)  # one-shot pruning made some of its members
    points = [(-p.measures["val_accuracy"], p.measures["nonzero_params"]) for p in result.front]
    assert points == sorted(points)
    assert [size for _, size in points] == sorted((size for _, size in points), reverse=True)
    assert result.ledger.front.hypervolume() > 0


def test_optuna_has_every_trial_with_its_values(finished: tuple[Path, SearchResult]) -> None:
    directory, result = finished
    told = {trial.number: trial for trial in study_of(directory, result).trials}
    assert len(told) == 6
    for record in result.ledger.trials:
        assert record.number is not None
        assert told[record.number].values == [
            record.measures["val_accuracy"],
            record.measures["nonzero_params"],
        ]
        assert told[record.number].params == record.values


def test_mlflow_has_the_search_with_a_child_for_every_trial(
    finished: tuple[Path, SearchResult],
) -> None:
    directory, result = finished
    parent, children = runs_of(directory, result)
    assert set(children) == {"dense", *(f"trial-{n:03d}" for n in range(6))}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["hypervolume"] == pytest.approx(result.ledger.front.hypervolume())
    assert parent.data.metrics["front_size"] == len(result.front)
    assert parent.data.metrics["trials_completed"] == 6
    for record in result.ledger.trials:
        run = children[record.label]
        assert run.info.status == "FINISHED"
        assert run.data.params == {
            path: str(value) for path, value in (record.values | {"seed": record.seed}).items()
        }
        assert {name: run.data.metrics[name] for name in record.measures} == pytest.approx(
            record.measures
        )
        history = MlflowClient(f"sqlite:///{directory}/slimfront.db").get_metric_history(
            run.info.run_id, "nonzero_params"
        )
        assert [m.step for m in history] == [point.epoch for point in record.points] == [1, 2]
    tagged = {
        name for name, run in children.items() if run.data.tags.get("slimfront.front") == "true"
    }
    assert tagged == {point.trial.label for point in result.front}


def test_metrics_of_every_epoch_are_there_once(finished: tuple[Path, SearchResult]) -> None:
    directory, result = finished
    _, children = runs_of(directory, result)
    client = MlflowClient(f"sqlite:///{directory}/slimfront.db")
    for run in children.values():
        for name in ("epoch/train_loss", "epoch/val_accuracy", "epoch/sparsity"):
            assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [
                1,
                2,
            ]


def test_the_experiment_opens_in_model_training_mode(finished: tuple[Path, SearchResult]) -> None:
    directory, _ = finished
    experiment = MlflowClient(f"sqlite:///{directory}/slimfront.db").get_experiment_by_name("small")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_parent_has_the_front_as_png_as_offline_html_and_as_json(
    finished: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    directory, result = finished
    parent, _ = runs_of(directory, result)
    client = MlflowClient(f"sqlite:///{directory}/slimfront.db")
    files = {
        name: Path(client.download_artifacts(parent.info.run_id, name, str(tmp_path)))
        for name in ("front.png", "front.html", "front.json", "config.yaml")
    }
    assert files["front.png"].read_bytes().startswith(b"\x89PNG")
    page = files["front.html"].read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page  # nothing is loaded from the network
    assert json.loads(files["front.json"].read_text()) == json.loads(json.dumps(as_json(result)))
    assert "sparsifier.sparsity" in files["config.yaml"].read_text()


def test_the_json_has_what_programs_need(finished: tuple[Path, SearchResult]) -> None:
    directory, result = finished
    plain = as_json(result)
    keys = [
        "search",
        "objectives",
        "quality",
        "described",
        "trials",
        "dense",
        "tolerance",
        "recommended",
        "front",
        "hypervolume",
        "hypervolume_full",
        "wall_seconds",
        "tracking_uri",
        "undelivered",
    ]
    assert list(plain) == keys
    assert plain["undelivered"] is False
    assert plain["trials"] == {"completed": 6, "stopped": 0, "failed": 0, "repeated": 0}
    assert (
        plain["dense"]["nonzero_params"]
        == plain["dense"]["params"]
        == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    )
    _, children = runs_of(directory, result)
    for member in plain["front"]:
        assert children[member["trial"]].info.run_id == member["run_id"]
        assert set(member["params"]) == set(SMALL_CONFIG["space"])
        prefix = f"one_shot_{member['one_shot']}/" if member["one_shot"] else ""
        assert children[member["trial"]].data.metrics[f"{prefix}test_accuracy"] == pytest.approx(
            member["test_accuracy"]
        )
        if prefix:
            size = children[member["trial"]].data.metrics[f"{prefix}nonzero_params"]
            assert size == member["nonzero_params"]
        for name in (
            "val_accuracy",
            "test_accuracy",
            "nonzero_params",
            "total_params",
            "layers",
            "flops",
            "bytes",
        ):
            assert isinstance(member[name], int | float), name


def test_the_stored_network_of_a_front_member_has_its_measures_and_test_accuracy(
    finished: tuple[Path, SearchResult],
) -> None:
    _, result = finished
    data = load_once(small_config(Path("unused")).candidate({}).data, torch.device("cpu"))
    for point in result.front:
        assert point.file is not None
        network = restore(torch.load(point.file, weights_only=True))
        found = data.task.evaluate(network, *data.validation, prepare=data.prepare)
        assert found["val_accuracy"] == point.measures["val_accuracy"]
        tested = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
        assert point.tested is not None
        assert {name: point.tested[name] for name in tested} == tested
        assert set(point.tested) - set(tested) == {"val_accuracy_se", "test_accuracy_se"}
        found = measure(network, data.prepare(data.test.inputs))
        assert {name: found[name] for name in ("params", "nonzero_params", "layers", "flops")} == {
            name: point.measures[name] for name in ("params", "nonzero_params", "layers", "flops")
        }
        torch.load(point.file.parent / "training.pt", weights_only=True)


def test_checkpoints_are_kept_of_the_front_and_the_dense_network_only(
    finished: tuple[Path, SearchResult],
) -> None:
    directory, result = finished
    kept = {str(file.parent) for file in (directory / "runs").glob("*/session-1/*/*/network.pt")}
    assert result.ledger.dense is not None
    assert result.ledger.dense.last is not None
    assert kept == {point.origin.checkpoint for point in [*result.front, result.ledger.dense.last]}


def test_the_test_set_is_touched_for_front_members_and_the_dense_network_only(
    finished: tuple[Path, SearchResult],
) -> None:
    _, result = finished
    networks = [
        n
        for record in result.ledger.trials
        for point in record.points
        for n in (point, *point.pruned)
    ]
    assert {id(n) for n in networks if n.tested is not None} == {id(n) for n in result.front}
    assert result.ledger.dense is not None
    assert [p.tested is not None for p in result.ledger.dense.points] == [False, True]


def test_a_trial_can_be_repeated_alone_from_its_values_and_seed(
    finished: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    _, result = finished
    record = next(p.trial for p in result.front)
    values = record.values | {"training.seed": record.seed}
    alone = train(small_config(tmp_path).candidate(values))
    # The size of the stored state depends on the names of modules, the rest must be the same to the
    # bit.
    assert alone.measures == record.measures


@pytest.mark.slow
def test_with_one_trial_at_a_time_a_seed_repeats_suggestions_and_results(tmp_path: Path) -> None:
    def run(name: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
        # TPE looks at results after 10 trials.
        options = {
            "trials": 12,
            "concurrency": 1,
            "sampler": "tpe",
            "seed": 1,
        }
        (tmp_path / name).mkdir()
        result = run_search(
            small_config(tmp_path / name, search=options, training={"epochs": 1, "batch_size": 512})
        )
        return [(record.values, record.measures) for record in result.ledger.trials]

    assert run("first") == run("again")


def test_a_diverging_trial_is_failed_everywhere_and_the_search_goes_on(tmp_path: Path) -> None:
    space = {
        "training.lr": {"choices": [1e-3, 1e30]},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    }
    result = run_search(
        small_config(tmp_path, space=space, search={"trials": 8, "sampler": "random"})
    )
    failed = result.ledger.with_status("failed")
    assert failed
    assert result.front
    assert not result.all_failed
    _, children = runs_of(tmp_path, result)
    states = {trial.number: trial for trial in study_of(tmp_path, result).trials}
    for record in result.ledger.trials:
        assert record.number is not None
        diverged = record.values["training.lr"] == 1e30
        assert record.status == ("failed" if diverged else "completed")
        assert states[record.number].state == (TrialState.FAIL if diverged else TrialState.COMPLETE)
        assert children[record.label].info.status == ("FAILED" if diverged else "FINISHED")
        if diverged:
            assert (
                "diverged: the training loss is"
                in children[record.label].data.tags["slimfront.reason"]
            )
            assert "diverged: the training loss is" in states[record.number].user_attrs["failure"]


@pytest.mark.slow
def test_a_network_that_fits_into_no_memory_is_refused_before_the_search(tmp_path: Path) -> None:
    space = {
        "model.width": {"choices": [8, 1_000_000]},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    }
    with pytest.raises(UserError, match=r"the network cannot be built: .*alloc"):
        run_search(small_config(tmp_path, space=space, search={"trials": 4}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    training = SMALL_CONFIG["training"] | {"epochs": 30}
    killer = Kills(2)
    result = run_search(small_config(tmp_path, training=training, search={"trials": 4}), killer)
    assert killer.left == 0
    assert len(result.ledger.with_status("completed")) == 4
    check_histories(tmp_path, result, epochs=30)
    assert {trial.state for trial in study_of(tmp_path, result).trials} == {TrialState.COMPLETE}
    # What was continued is what an undisturbed training gives, to the bit.
    for record in result.ledger.trials:
        alone = train(
            small_config(tmp_path, training=training).candidate(
                record.values | {"training.seed": record.seed}
            )
        )
        assert alone.measures == record.measures


@pytest.mark.slow
def test_a_trial_of_two_processes_goes_on_after_one_of_them_is_killed(tmp_path: Path) -> None:
    resources = {"cpu": 2, "processes": 2}
    training = SMALL_CONFIG["training"] | {"epochs": 12}

    class KillsOne(Progress):
        """Kills a process that a trial started, once it has reported."""

        done = False

        def update(self, ledger: Ledger) -> None:
            if not self.done and ledger.trials and ledger.trials[0].points:
                for process in psutil.Process().children(recursive=True):
                    if "slimfront.trainables.distributed" in str(process.cmdline()):
                        process.kill()
                        self.done = True

    killer = KillsOne()
    result = run_search(
        small_config(tmp_path, training=training, resources=resources, search={"trials": 1}), killer
    )
    assert killer.done
    assert len(result.ledger.with_status("completed")) == 1
    check_histories(tmp_path, result, epochs=12)


@pytest.mark.slow
def test_a_worker_killed_more_often_than_is_retried_fails_its_trial_only(tmp_path: Path) -> None:
    training = SMALL_CONFIG["training"] | {"epochs": 30}
    killer = Kills(1)
    result = run_search(
        small_config(tmp_path, training=training, search={"trials": 4, "retries": 0}), killer
    )
    failed = [
        r
        for r in [*result.ledger.trials, result.ledger.dense]
        if r is not None and r.status == "failed"
    ]
    assert len(failed) == 1
    assert "it crashed, or was killed" in str(failed[0].reason)
    assert len(result.ledger.with_status("completed")) >= 3
    assert {trial.state for trial in study_of(tmp_path, result).trials} <= {
        TrialState.COMPLETE,
        TrialState.FAIL,
    }


@pytest.mark.slow
def test_when_all_trials_fail_there_is_no_front(tmp_path: Path) -> None:
    training = SMALL_CONFIG["training"] | {"lr": 1e30}
    result = run_search(small_config(tmp_path, training=training, search={"trials": 2}))
    assert result.all_failed
    assert result.front == []
    parent, _ = runs_of(tmp_path, result)
    assert parent.info.status == "FAILED"


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    class InterruptsAfterTwo(Progress):
        """Sends this process a SIGINT, as a terminal does, when two trials have ended."""

        def __init__(self) -> None:
            self.sent = False

        def update(self, ledger: Ledger) -> None:
            if len(ledger.with_status("completed")) >= 2 and not self.sent:
                self.sent = True
                threading.Timer(0.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    before = signal.getsignal(signal.SIGINT)
    started = time.monotonic()
    training = SMALL_CONFIG["training"] | {"epochs": 30}
    result = run_search(
        small_config(tmp_path, training=training, search={"trials": 500}, resources={"pack": 1}),
        InterruptsAfterTwo(),
    )
    assert time.monotonic() - started < 100
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert len(result.ledger.with_status("completed")) >= 2
    assert result.front
    assert all(record.status in ("completed", "stopped") for record in result.ledger.trials)
    parent, children = runs_of(tmp_path, result)
    assert parent.info.status == "KILLED"
    for record in result.ledger.trials:
        assert children[record.label].info.status == (
            "FINISHED" if record.status == "completed" else "KILLED"
        )
    # What was cut off waits in the study for a resume.
    waiting = {
        trial.number
        for trial in study_of(tmp_path, result).trials
        if trial.state == TrialState.RUNNING
    }
    assert waiting == {record.number for record in result.ledger.with_status("stopped")}
    done = len(result.ledger.with_status("completed"))
    again = resume_search(
        result.search, [f"search.trials={done + 2}"], storage_path=str(tmp_path / "runs")
    )
    assert not again.interrupted
    assert {trial.state for trial in study_of(tmp_path, again).trials} == {TrialState.COMPLETE}
    assert len(again.ledger.trials) == len(again.ledger.with_status("completed")) == done + 2
    check_histories(tmp_path, again, epochs=30)
    parent, children = runs_of(tmp_path, again)
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}


@pytest.mark.slow
def test_a_front_member_whose_network_is_lost_stays_on_the_front(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Loses(Progress):
        """Deletes the network of the first front member while the search goes on."""

        def update(self, ledger: Ledger) -> None:
            for point in ledger.front.members()[:1]:
                Path(str(point.file)).unlink(missing_ok=True)

    result = run_search(small_config(tmp_path, search={"trials": 2}), Loses())
    assert result.front[0].tested is None
    assert "was not measured on the test set" in caplog.text


@pytest.mark.slow
def test_a_full_disk_ends_the_search_in_one_sentence_and_loses_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Journal.append

    def append(self: Journal, event: Event) -> Event:
        if isinstance(event, TrialEnded) and event.number == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, event)

    config = small_config(tmp_path, search={"trials": 4, "concurrency": 1})
    monkeypatch.setattr(Journal, "append", append)
    with pytest.raises(
        UserError, match=r"full cannot be kept in .*runs/full \(No space left on device\)"
    ) as caught:
        run_search(config, name="full")
    assert "make room, then `slimfront resume full`" in str(caught.value)
    monkeypatch.undo()
    result = resume_search("full", storage_path=str(tmp_path / "runs"))
    assert len(result.ledger.with_status("completed")) == 4
    check_histories(tmp_path, result, epochs=2)


@pytest.mark.parametrize("resource", ["gpu", "cpu"])
def test_more_than_the_cluster_has_is_refused_before_any_trial(
    tmp_path: Path, resource: str
) -> None:
    with pytest.raises(
        UserError,
        match=rf"resources\.{resource}: a trial asks for 64 {resource.upper()}, and there is",
    ):
        run_search(
            small_config(
                tmp_path, resources={resource: 64}, search={"trials": 4, "concurrency": "auto"}
            )
        )
    assert not (tmp_path / "runs").exists()


def test_a_storage_path_that_cannot_be_written_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError, match=r"search\.storage_path: cannot write to"):
        run_search(config)


def test_a_network_that_does_not_fit_is_refused_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model 'mlp' does not work on the data set 'digits'"):
        run_search(small_config(tmp_path, model={"name": "mlp", "width": 1_000_000}))


def test_a_network_that_returns_a_mapping_is_refused_with_what_would_be_right(
    tmp_path: Path,
) -> None:
    model = {"factory": "tests.trainables.test_rehearsal:Mapped"}
    with pytest.raises(UserError, match="returns a dict; it must return one tensor, logits"):
        run_search(small_config(tmp_path, model=model))


@pytest.mark.parametrize(
    ("sparsifier", "space", "message"),
    [
        (
            {"name": "random", "exclude": ["head"]},
            {},
            r"sparsifier\.exclude: 'head' is not a linear or convolutional layer",
        ),
        (
            {"name": "rigl", "every": 2},
            {"sparsifier.every": {"low": 2, "high": 9999}},
            r"sparsifier\.every \(9999\) is longer",
        ),
        (
            {"name": "lottery", "rounds": 9999},
            {},
            r"sparsifier\.rounds \(9999\) needs 10000 trainings",
        ),
        (
            {"name": "nm", "m": 5},
            {"training.lr": {"low": 1e-4, "high": 1e-2}},
            r"no layer of this network has a multiple of m \(5\)",
        ),
    ],
)
def test_a_sparsifier_that_cannot_work_on_the_network_is_refused_before_any_trial(
    tmp_path: Path, sparsifier: dict[str, Any], space: dict[str, Any], message: str
) -> None:
    vary = {} if sparsifier["name"] == "nm" else {"sparsifier.sparsity": {"low": 0.5, "high": 0.9}}
    with pytest.raises(UserError, match=message):
        run_search(small_config(tmp_path, sparsifier=sparsifier, space=vary | space))
