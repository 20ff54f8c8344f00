"""What is looked at after a search, and what happens to its processes while it runs."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from slimfront.search.engine.progress import Progress
from slimfront.search.record.events import parse
from slimfront.search.record.journal import _encoded, read_events
from slimfront.search.record.ledger import Ledger, SearchResult


def study_of(directory: Path, result: SearchResult) -> optuna.Study:
    journal = JournalFileBackend(str(directory / "runs" / result.search / "study.journal"))
    return optuna.load_study(study_name=result.search, storage=JournalStorage(journal))


def runs_of(directory: Path, result: SearchResult) -> tuple[Run, dict[str, Run]]:
    """The parent run of a search, and its child runs by name."""
    client = MlflowClient(f"sqlite:///{directory}/slimfront.db")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.`slimfront.search` = '{result.search}'"
    )
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
    ]
    assert len(children) + 1 == len(runs)
    return parents[0], {str(run.info.run_name): run for run in children}


def actors(name: str) -> list[psutil.Process]:
    """The processes of this process's Ray that are actors of a class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ray::{name}" in str(process.cmdline()):
                found.append(process)
    return found


class Kills(Progress):
    """Kills a process that trains, `times` times, each when another trial has ended or reported
    since."""

    def __init__(self, times: int, actor: str = "CandidateTrainable") -> None:
        self.left = times
        self.actor = actor
        self.seen = 0

    def update(self, ledger: Ledger) -> None:
        reports = sum(len(record.points) for record in ledger.trials)
        if reports > self.seen and self.left:
            # Ray names a process after what it does, ray::CandidateTrainable.train; one without a
            # method may wait for no trial.
            busy = actors(f"{self.actor}.") or actors(self.actor)
            if busy:
                os.kill(busy[0].pid, signal.SIGKILL)
                self.left -= 1
                self.seen = reports


def replace_in_journal(file: Path, old: str, new: str) -> None:
    """Writes a journal with another text for `old`, as its search would have written it
    elsewhere."""
    events = [
        parse(json.loads(json.dumps(event.as_plain()).replace(old, new)))
        for event in read_events(file)
    ]
    file.write_bytes(b"".join(_encoded(event) for event in events))


def check_histories(directory: Path, result: SearchResult, epochs: int) -> None:
    """Every finished trial has every epoch once in MLflow, and each network that was measured
    once."""
    client = MlflowClient(f"sqlite:///{directory}/slimfront.db")
    for name, run in runs_of(directory, result)[1].items():
        record = result.ledger.by_label[name]
        if record.status == "completed":
            history = client.get_metric_history(run.info.run_id, "epoch/train_loss")
            assert [point.step for point in history] == list(range(1, epochs + 1)), name
            measured = [
                point.step for point in client.get_metric_history(run.info.run_id, "nonzero_params")
            ]
            assert measured == [point.epoch for point in record.points]
            assert len(set(measured)) == len(measured)
