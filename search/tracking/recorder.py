"""Records a search in MLflow: a parent run, a child run per trial, and the front. Only the driver writes.

What is written follows from the journal of the search alone, event by event, with the journal's times: so a write that is made
twice (after a crash, or by `slimfront sync`) changes nothing, and one that failed can be made later.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from search.config import Config
from search.journal import Event
from search.records import Ledger, label
from search.tracking.page import Page, as_params, batches, live_metrics
from search.tracking.store import open_experiment

log = logging.getLogger(__name__)

DELIVERED_FILE = "delivered"
_PATIENCE_S = (1.0, 30.0)
"""First and longest wait between two attempts of a write that failed."""
_GRACE_S = 10.0
"""How long the end of a search waits for a store that does not answer."""
_PAGE_EVERY_S = 30.0
_BATCH = 1000
_MLFLOW_STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_HOPELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
"""MLflow's error codes of writes that would fail again: they are skipped with a warning."""


class Recorder:
    """Writes one search to MLflow, in a thread of its own so that the search does not wait.

    Events that the store does not take are tried again until it does. What is still missing at the end stays in the journal:
    `slimfront sync` delivers it.
    """

    def __init__(self, client: MlflowClient, config: Config, search: str, directory: Path, earlier: Iterable[Event] = ()) -> None:
        """Makes the parent run at once, or finds it again; raises what MLflow raises if that fails.

        Args:
            directory: of the search; the number of events delivered is kept in it.
            earlier: all events of the journal so far.
        """
        self.client = client
        self.config = config
        self.search = search
        self.ledger: Ledger | None = None
        self.begun = 0
        artifacts = directory.parent / "artifacts"
        self.experiment_id = open_experiment(client, config.tracking.experiment or config.name, artifacts, config.tracking.uri)
        self.directory = directory
        self.mark = directory / DELIVERED_FILE
        self.delivered = int(self.mark.read_text() or 0) if self.mark.exists() else 0
        self.run_ids = self._known_runs()
        if "" not in self.run_ids:
            tags = {"slimfront.role": "search", "slimfront.search": search}
            self.run_ids[""] = client.create_run(self.experiment_id, run_name=search, tags=tags).info.run_id
        self.warned = False
        self.monitor: SystemMetricsMonitor | None = None
        self.closing = threading.Event()
        self.page = Page(client, config, search, self.experiment_id, self.run_ids)
        self.history: list[tuple[float, int, float]] = []
        """Minutes since the beginning, epochs trained, and hypervolume, at each end of a trial."""
        self.epochs = 0
        self.pictured = time.monotonic()
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        for event in earlier:
            self.events.put(event)
        self.thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self.thread.start()

    @property
    def parent(self) -> str:
        """The id of the parent run."""
        return self.run_ids[""]

    def _known_runs(self) -> dict[str, str]:
        """Ids of this search's runs in the store, by label; the parent is ''."""
        found: dict[str, str] = {}
        token = None
        while True:
            query = f"tags.`slimfront.search` = '{self.search}'"
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            for run in page:
                found[run.data.tags.get("slimfront.trial", "")] = run.info.run_id
            token = page.token
            if not token:
                return found

    def watch_system(self) -> None:
        """Logs the use of this machine on the parent run from now on, until `close`."""
        uri = self.config.tracking.absolute_uri()
        self.monitor = SystemMetricsMonitor(self.parent, resume_logging=True, tracking_uri=uri)
        self.monitor.start()

    def take(self, event: Event) -> None:
        """Hands over the next event of the journal."""
        self.events.put(event)

    def close(self) -> bool:
        """Waits until everything handed over is written, or the store has not answered for a while; whether all is written."""
        if self.monitor is not None:
            self.monitor.finish()
        self.closing.set()
        self.events.put(None)
        self.thread.join()
        return self.events.empty()

    def _deliver(self) -> None:
        number = 0
        while (event := self.events.get()) is not None:
            number += 1
            known = number <= self.delivered
            if event["event"] == "begun":
                objectives, constraints = self.config.chosen_objectives(), self.config.chosen_constraints()
                self.ledger = Ledger(objectives, event["dense_sizes"], constraints, self.directory)
                self.begun = event["time"]
            if self.ledger is not None:
                self.ledger.apply(event)
                self._remember(event, self.ledger)
            if known:
                continue
            if not self._insist(event):
                self.events.put(event)  # not empty: something is missing
                return
            self.delivered = number
            self.mark.write_text(str(number))

    def _remember(self, event: Event, ledger: Ledger) -> None:
        if event["event"] == "epochs":
            self.epochs += len(event["history"])
        elif event["event"] == "ended" and event["number"] is not None:
            self.history.append(((event["time"] - self.begun) / 60_000, self.epochs, ledger.hypervolume()))

    def _insist(self, event: Event) -> bool:
        """Writes one event, however often it takes; False if the search ends and the store does not answer."""
        wait, gave_up_at = _PATIENCE_S[0], None
        while True:
            try:
                self._write(event)
                return True
            except Exception as error:  # stores raise their own kinds
                said = (str(error).splitlines() or [type(error).__name__])[0][:200]
                if isinstance(error, MlflowException) and error.error_code in _HOPELESS:
                    log.warning("MLflow refused a write (%s); the search goes on without it", said)
                    return True
                if not self.warned:
                    self.warned = True
                    log.warning(
                        "MLflow did not take a write (%s); the search goes on, and it is written as soon as MLflow can", said
                    )
            if self.closing.is_set():
                gave_up_at = gave_up_at or time.monotonic() + _GRACE_S
                if time.monotonic() >= gave_up_at:
                    return False
                time.sleep(min(wait, 1.0))
            else:
                self.closing.wait(wait)
            wait = min(2 * wait, _PATIENCE_S[1])

    def _write(self, event: Event) -> None:
        writer = getattr(self, f"_write_{event['event']}", None)
        if writer:
            writer(event)

    def _write_begun(self, _event: Event) -> None:
        self.page.begin()

    def _write_session(self, event: Event) -> None:
        if event["session"] > 1:
            self.client.update_run(self.parent, status="RUNNING")

    def _write_trial(self, event: Event) -> None:
        name = label(event["number"])
        tags = {
            "mlflow.parentRunId": self.parent,
            "slimfront.role": "dense" if event["number"] is None else "trial",
            "slimfront.search": self.search,
            "slimfront.trial": name,
            "slimfront.seed": str(event["seed"]),
        }
        if name not in self.run_ids:
            run = self.client.create_run(self.experiment_id, start_time=event["time"], run_name=name, tags=tags)
            self.run_ids[name] = run.info.run_id
        self.client.log_batch(self.run_ids[name], params=as_params(event["values"] | {"seed": event["seed"]}))

    def _write_continued(self, event: Event) -> None:
        self.client.update_run(self.run_ids[label(event["number"])], status="RUNNING")

    def _write_epochs(self, event: Event) -> None:
        """The metrics of some epochs as `epoch/NAME`, with step = epoch; the plain names are for the compact network."""
        metrics = [
            Metric(f"epoch/{name}", float(value), event["time"], int(epoch["epoch"]))
            for epoch in event["history"]
            for name, value in epoch.items()
            if name != "epoch"
        ]
        for batch in batches(metrics, _BATCH):
            self.client.log_batch(self.run_ids[label(event["number"])], metrics=batch)

    def _write_point(self, event: Event) -> None:
        """The measures of the compact network, with step = epoch."""
        metrics = [Metric(name, float(value), event["time"], event["epoch"]) for name, value in event["measures"].items()]
        self.client.log_batch(self.run_ids[label(event["number"])], metrics=metrics)

    def _write_ended(self, event: Event) -> None:
        self._end(event, event["status"], event["reason"])

    def _write_interrupted(self, event: Event) -> None:
        self._end(event, "interrupted", "interrupted; `slimfront resume` continues it")

    def _end(self, event: Event, status: str, reason: str | None) -> None:
        run_id = self.run_ids[label(event["number"])]
        tags = [RunTag("slimfront.status", status)] + ([RunTag("slimfront.reason", reason[:5000])] if reason else [])
        self.client.log_batch(run_id, tags=tags)
        self.client.set_terminated(run_id, _MLFLOW_STATUS[status], end_time=event["time"])
        if event["number"] is not None:
            self._write_live(event)

    def _write_live(self, event: Event) -> None:
        """The state of the search on the parent, with step = trials that have ended; its page now and then."""
        assert self.ledger is not None
        live = live_metrics(self.ledger)
        step = int(sum(value for name, value in live.items() if name.startswith("trials_")))
        self.client.log_batch(self.parent, metrics=[Metric(name, value, event["time"], step) for name, value in live.items()])
        if time.monotonic() - self.pictured > _PAGE_EVERY_S:
            self.pictured = time.monotonic()
            self.page.refresh(self.ledger, self.history)

    def _write_tested(self, event: Event) -> None:
        """The test accuracy of a front member; where it was pruned, with all its measures, as `one_shot_STEP/NAME`."""
        assert self.ledger is not None
        step, measures = event.get("step", 0), {"test_accuracy": event["test_accuracy"]}
        if step:
            measures |= self.ledger.find(self.ledger.by_label[label(event["number"])], event["epoch"], step).measures
        prefix = f"one_shot_{step}/" if step else ""
        metrics = [Metric(prefix + name, float(value), event["time"], event["epoch"]) for name, value in measures.items()]
        self.client.log_batch(self.run_ids[label(event["number"])], metrics=metrics)

    def _write_finished(self, event: Event) -> None:
        """Completes the page of the search, and ends the parent run."""
        assert self.ledger is not None
        self.page.finish(self.ledger, self.history, event["seconds"], interrupted=event["status"] == "interrupted")
        self.client.set_tag(self.parent, "slimfront.status", event["status"])
        ends = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.parent, ends[event["status"]], end_time=event["time"])
