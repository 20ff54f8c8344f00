"""Records a search in MLflow: a parent run, a child run per trial, and the front. Only the driver writes."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from search.config import Config, dump
from search.objectives import Objective
from search.records import Ledger, SearchResult, TrialRecord
from search.report import as_json
from search.space import flatten
from search.tracking import figures
from search.tracking.store import open_experiment

log = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""Writes that fail in a row before a search stops trying."""

_MLFLOW_STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": "KILLED"}


class Recorder:
    """Writes one search to MLflow, in a thread of its own so that the search does not wait.

    A write that fails costs a warning, never a trial: the search goes on, and its results stay in the study. After several
    failures in a row nothing more is written, so that a dead server does not hold up the end of a search.
    """

    def __init__(self, client: MlflowClient, config: Config, search: str, artifacts: Path) -> None:
        """Makes the parent run at once; raises what MLflow raises if that fails."""
        self.client = client
        self.search = search
        self.experiment_id = open_experiment(client, config.tracking.experiment or config.name, artifacts, config.tracking.uri)
        tags = {"slimfront.role": "search", "slimfront.search": search}
        self.parent = client.create_run(self.experiment_id, run_name=search, tags=tags).info.run_id
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self.failed_writes = 0
        self.failed_in_a_row = 0
        params = {key: value for key, value in flatten(config.model_dump(mode="json")).items() if value is not None}
        params["tracking.uri"] = config.tracking.shown_uri()
        self._write(client.log_batch, self.parent, params=_params(params))
        self._write(client.log_text, self.parent, dump(config), "config.yaml")

    def start_trial(self, record: TrialRecord) -> None:
        """Makes the child run, with the searched values and the seed as params."""
        tags = {
            "mlflow.parentRunId": self.parent,
            "slimfront.role": "dense" if record.number is None else "trial",
            "slimfront.search": self.search,
            "slimfront.trial": record.label,
            "slimfront.seed": str(record.seed),
        }

        def create() -> None:
            run = self.client.create_run(self.experiment_id, run_name=record.label, tags=tags)
            record.run_id = run.info.run_id
            self.client.log_batch(record.run_id, params=_params(record.values | {"seed": record.seed}))

        self._write(create)

    def log_epochs(self, record: TrialRecord, history: list[dict[str, Any]]) -> None:
        """Writes the metrics of some epochs as `epoch/NAME`, with step = epoch; the plain names are for the compact network."""
        now = _now()
        metrics = [
            Metric(f"epoch/{name}", float(value), now, int(epoch["epoch"]))
            for epoch in history
            for name, value in epoch.items()
            if name != "epoch"
        ]
        self._write(lambda: record.run_id and self.client.log_batch(record.run_id, metrics=metrics))

    def end_trial(self, record: TrialRecord, ledger: Ledger) -> None:
        """Writes the measures and the end of a trial, and the live state of the search on the parent."""
        now = _now()
        measures = [Metric(name, float(value), now, 0) for name, value in record.measures.items()]
        tags = [RunTag("slimfront.status", record.status)]
        if record.reason:
            tags.append(RunTag("slimfront.reason", record.reason[:5000]))

        def end() -> None:
            if record.run_id:
                self.client.log_batch(record.run_id, metrics=measures, tags=tags)
                self.client.set_terminated(record.run_id, _MLFLOW_STATUS[record.status])

        self._write(end)
        done = {status: len(ledger.with_status(status)) for status in ("completed", "stopped", "failed")}
        live = {"hypervolume": ledger.hypervolume(), "front_size": len(ledger.front())}
        live |= {f"trials_{status}": count for status, count in done.items()}
        step = sum(done.values())
        self._write(self.client.log_batch, self.parent, metrics=[Metric(k, float(v), now, step) for k, v in live.items()])

    def finish(self, result: SearchResult) -> None:
        """Tags the front, writes its figures and its table, ends the parent run, and waits until all is written."""
        ledger, front = result.ledger, result.front
        for record in front:
            self._write(self._tag_front_member, record)
        if ledger.dense and ledger.dense.test_accuracy is not None:
            self._write(self._log_test_accuracy, ledger.dense)
        self._write(lambda: self.client.log_dict(self.parent, as_json(result), "front.json"))
        if front:
            self._write(self._log_figures, ledger, ledger.objectives)
        status, word = ("FINISHED", "completed") if front else ("FAILED", "failed")
        if result.interrupted:
            status, word = "KILLED", "interrupted"
        self._write(self.client.set_tag, self.parent, "slimfront.status", word)
        self._write(self.client.set_terminated, self.parent, status)
        self.close()

    def close(self) -> None:
        """Waits until everything handed over is written."""
        self.writer.shutdown(wait=True)

    def _tag_front_member(self, record: TrialRecord) -> None:
        if record.run_id:
            self.client.set_tag(record.run_id, "slimfront.front", "true")
            self._log_test_accuracy(record)

    def _log_test_accuracy(self, record: TrialRecord) -> None:
        if record.run_id and record.test_accuracy is not None:
            self.client.log_metric(record.run_id, "test_accuracy", record.test_accuracy, step=0)

    def _log_figures(self, ledger: Ledger, objectives: list[Objective]) -> None:
        self.client.log_figure(self.parent, figures.front_png(ledger, objectives, self.search), "front.png")
        self.client.log_text(self.parent, figures.front_html(ledger, objectives, self.search), "front.html")

    def _write(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def attempt() -> None:
            if self.failed_in_a_row >= _GIVE_UP_AFTER:
                return
            try:
                call(*args, **kwargs)
                self.failed_in_a_row = 0
            except Exception as error:
                self.failed_in_a_row += 1
                self.failed_writes += 1
                if self.failed_writes == 1:
                    log.warning(
                        "MLflow did not take a write (%s); the search goes on without it", str(error).splitlines()[0][:200]
                    )

        self.writer.submit(attempt)


def _params(values: dict[str, Any]) -> list[Param]:
    return [Param(key, str(value)) for key, value in values.items()]


def _now() -> int:
    return int(time.time() * 1000)
