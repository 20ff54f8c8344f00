"""Records a search in MLflow: a parent run, a child run per trial, and the front. Only the driver
writes.

What is written follows from the journal of the search alone, event by event, with the journal's
times: so a write that is made twice (after a crash, or by `slimfront sync`) changes nothing, and
one that failed can be made later.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from slimfront.search.config.schema import Config
from slimfront.search.record.events import (
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworkReplicated,
    NetworksPruned,
    NetworkTested,
    NetworkTimed,
    SearchBegan,
    SessionBegan,
    SessionEnded,
    TrialBegan,
    TrialContinued,
    TrialEnded,
    TrialInterrupted,
)
from slimfront.search.record.fencing import Superseded
from slimfront.search.record.ledger import Ledger, ledger_of
from slimfront.search.record.trials import label, replicated
from slimfront.search.tracking.page import Page, last_tags, live_metrics
from slimfront.search.tracking.store import open_experiment, run_route
from slimfront.search.tracking.write_queue import (
    PendingWrites,
    WriteQueue,
    unless_impossible,
)
from slimfront.trainables.errors import first_line
from slimfront.trainables.training.finishing import RECOVERY_EPOCHS

log = logging.getLogger(__name__)

DELIVERED_FILE = "delivered"
REFUSED_FILE = "refused"
"""Names what MLflow refused for good, one a line."""
_PATIENCE_S = (1.0, 30.0)
"""First and longest wait between two attempts of a write that failed."""
_GRACE_S = 10.0
"""How long the end of a search waits for a store that does not answer."""
_REMOTE = ("http:", "https:", "databricks")
_PAGE_EVERY_S = 30.0
_LOOK_EVERY_S = 0.5
"""How often is looked whether something has waited long enough to be written."""
_MLFLOW_STATUS = {
    "completed": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class Recorder:
    """Writes one search to MLflow, in a thread of its own so that the search does not wait.

    Events are put together for a few seconds, and what the store does not take is tried again until
    it does. What is still missing at the end stays in the journal: `slimfront sync` delivers it.
    """

    def __init__(
        self,
        client: MlflowClient,
        config: Config,
        search: str,
        directory: Path,
        earlier: Iterable[Event] = (),
        place: str | None = None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the parent run at once, or finds it again; raises what MLflow raises if that fails.

        Args:
            directory: of the search; the number of events delivered is kept in it.
            earlier: all events of the journal so far.
            place: where its checkpoints are, if not there.
            may_write: raises Superseded once another driver has the search.
        """
        self.client = client
        self.config = config
        self.search = search
        self.ledger: Ledger | None = None
        self.begun = 0
        artifacts = directory.parent / "artifacts"
        self.experiment_id = open_experiment(
            client, config.tracking.experiment or config.name, artifacts, config.tracking.uri
        )
        self.place = place or str(directory)
        self.mark = directory / DELIVERED_FILE
        self.delivered = _number_in(self.mark)
        self.run_ids = self._known_runs()
        if "" not in self.run_ids:
            tags = {"slimfront.role": "search", "slimfront.search": search}
            self.run_ids[""] = client.create_run(
                self.experiment_id, run_name=search, tags=tags
            ).info.run_id
        self.warned = False
        self.monitor: SystemMetricsMonitor | None = None
        self.closing = threading.Event()
        embedded = not config.tracking.uri.startswith(_REMOTE)
        self.write_queue = WriteQueue(
            client, self.experiment_id, self.run_ids, embedded=embedded, may_write=may_write
        )
        self.refused_file = directory / REFUSED_FILE
        if self.refused_file.exists():
            self.write_queue.refused += self.refused_file.read_text(encoding="utf-8").splitlines()
        self.page = Page(
            client=client,
            config=config,
            search=search,
            experiment_id=self.experiment_id,
            run_ids=self.run_ids,
            write_queue=self.write_queue,
        )
        self.history: list[tuple[float, int, float]] = []
        """Minutes since the beginning, epochs trained, and hypervolume, at each end of a trial."""
        self.epochs = 0
        self.pictured = time.monotonic()
        self.page_work: dict[str, Callable[[], None]] = {}
        """What is to be written on the page after what is pending, by kind."""
        self.complete = True
        self.number = 0
        """Of the event that was taken in last."""
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        for event in earlier:
            self.events.put(event)
        self.thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self.thread.start()

    @property
    def parent(self) -> str:
        """The id of the parent run."""
        return self.run_ids[""]

    @property
    def page_address(self) -> str | None:
        """The address of the search's page; None if its store has no server."""
        uri = self.config.tracking.shown_uri().rstrip("/")
        if not uri.startswith(("http:", "https:")):
            return None
        route = run_route(self.experiment_id, self.parent)
        return uri + route

    def _known_runs(self) -> dict[str, str]:
        """Ids of this search's runs in the store, by label; the parent is ''."""
        found: dict[str, str] = {}
        token = None
        while True:
            query = f"tags.`slimfront.search` = '{self.search}'"
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=1000, page_token=token
            )
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
        """Waits until everything handed over is written, or the store has not answered for a while;
        whether all is written."""
        if self.monitor is not None:
            self.monitor.finish()
        self.closing.set()
        self.events.put(None)
        self.thread.join()
        return self.complete

    def _deliver(self) -> None:
        over = False
        while not over:
            for event in self._next():
                if event is None:
                    over = True
                else:
                    self.number += 1
                    self._take_in(event, known=self.number <= self.delivered)
            if not self._insist(partial(self._write, everything=over)):
                self.complete = False
                return
            done = self.write_queue.done(self.number)
            if done > self.delivered:
                self.delivered = done
                self._keep(self.mark, str(done))
                self._keep(self.refused_file, "".join(f"{name}\n" for name in self.refused))

    @property
    def refused(self) -> list[str]:
        """What MLflow refused for good, by name, each once."""
        distinct = dict.fromkeys(self.write_queue.refused)
        return list(distinct)

    def _keep(self, file: Path, content: str) -> None:
        """Writes one of the files that say what MLflow has; without it, a resume only delivers
        again what is there already."""
        try:
            file.write_text(content, encoding="utf-8")
        except OSError as error:
            log.debug("%s cannot be written: %s", file, error)

    def _next(self) -> list[Event | None]:
        """The events that have come, at least one unless something waits to be written; None is the
        end."""
        patience = None
        if self.write_queue.pending:
            patience = _LOOK_EVERY_S
        events = []
        with contextlib.suppress(queue.Empty):
            events.append(self.events.get(timeout=patience))
            while True:
                events.append(self.events.get_nowait())
        return events

    def _take_in(self, event: Event, *, known: bool) -> None:
        """Brings the records up to date, and puts what is new into the write_queue."""
        if isinstance(event, SearchBegan):
            self.ledger = ledger_of(self.config, event, self.place)
            self.begun = event.time
        if self.ledger is not None:
            self.ledger.apply(event)
            self._remember(event, self.ledger)
        if known:
            return
        put = getattr(self, f"_put_{event.kind}", None)
        if put is not None:
            put(event)

    def _remember(self, event: Event, ledger: Ledger) -> None:
        if isinstance(event, EpochsReported):
            self.epochs += len(event.history)
        if isinstance(event, NetworkMeasured):
            self.epochs += _further_epochs(event.measures)
        if isinstance(event, NetworkMeasured | NetworksPruned):
            for network in event.pruned:
                self.epochs += _further_epochs(network["measures"])
        if isinstance(event, TrialEnded) and event.number is not None:
            milliseconds = event.time - self.begun
            minutes = milliseconds / 60_000
            hypervolume = ledger.front.hypervolume()
            self.history.append((minutes, self.epochs, hypervolume))

    def _write(self, *, everything: bool) -> None:
        """What has waited long enough, or everything."""
        ends = "finish" in self.page_work
        self.write_queue.send(everything=everything or ends)
        for kind in list(self.page_work):
            work = self.page_work[kind]
            self._on_page(work)
            del self.page_work[kind]

    def _on_page(self, work: Callable[[], None]) -> None:
        """Writes something of the search's own page, as far as it can be made and MLflow takes
        it."""
        self.write_queue.may_write()
        page = "the page of the search"
        unless_impossible(page, lambda: self.write_queue.unless_refused(page, work))
        self.write_queue.look()

    def _insist(self, write: Callable[[], None]) -> bool:
        """Writes, however often it takes; False if the search ends and the store does not
        answer, or if another driver has the search."""
        wait = _PATIENCE_S[0]
        gave_up_at = None
        while True:
            try:
                write()
                return True
            except Superseded:
                return False
            except Exception as error:  # stores raise their own kinds
                if not self.warned:
                    self.warned = True
                    log.warning(
                        "MLflow did not take a write (%s); the search goes on, and it is written "
                        "as soon as MLflow can",
                        first_line(error),
                    )
            if self.closing.is_set():
                gave_up_at = gave_up_at or time.monotonic() + _GRACE_S
                if time.monotonic() >= gave_up_at:
                    return False
                time.sleep(min(wait, 1.0))
            else:
                self.closing.wait(wait)
            wait = min(2 * wait, _PATIENCE_S[1])

    def _to(self, name: str) -> PendingWrites:
        return self.write_queue.to(name, self.number)

    def _put_begun(self, _event: SearchBegan) -> None:
        self.page_work["begin"] = self.page.begin

    def _put_session(self, event: SessionBegan) -> None:
        if event.session > 1:
            self._to("").status = "RUNNING"
            # Of a session before, whose end could not be written.
            self.page_work.pop("finish", None)

    def _put_trial(self, event: TrialBegan) -> None:
        name = label(event.number)
        tags = {
            "mlflow.parentRunId": self.parent,
            "slimfront.role": "dense" if event.number is None else "trial",
            "slimfront.search": self.search,
            "slimfront.trial": name,
            "slimfront.seed": str(event.seed),
        }
        writes = self._to(name)
        writes.creation = {"start_time": event.time, "run_name": name, "tags": tags}
        writes.add_params(event.values | {"seed": event.seed})

    def _put_continued(self, event: TrialContinued) -> None:
        writes = self._to(label(event.number))
        writes.status = "RUNNING"
        writes.ended = None

    def _put_epochs(self, event: EpochsReported) -> None:
        """The metrics of some epochs as `epoch/NAME`, with step = epoch; the plain names are for
        the compact network."""
        writes = self._to(label(event.number))
        for epoch in event.history:
            values = {}
            for name, value in epoch.items():
                if name != "epoch":
                    values[f"epoch/{name}"] = value
            writes.add_metrics(values, event.time, int(epoch["epoch"]))

    def _put_point(self, event: NetworkMeasured) -> None:
        """The measures of the compact network, with step = epoch."""
        writes = self._to(label(event.number))
        writes.add_metrics(event.measures, event.time, event.epoch)

    def _put_ended(self, event: TrialEnded) -> None:
        self._end(event, event.status, event.reason)

    def _put_interrupted(self, event: TrialInterrupted) -> None:
        self._end(event, "interrupted", "interrupted; `slimfront resume` continues it")

    def _end(self, event: TrialEnded | TrialInterrupted, status: str, reason: str | None) -> None:
        writes = self._to(label(event.number))
        tags = {"slimfront.status": status}
        if reason:
            tags["slimfront.reason"] = reason[:5000]
        writes.add_tags(tags)
        writes.status = _MLFLOW_STATUS[status]
        writes.ended = event.time
        if event.number is not None:
            self._put_live(event)

    def _put_live(self, event: Event) -> None:
        """The state of the search on the parent, with step = trials that have ended; its page now
        and then."""
        assert self.ledger is not None
        live = live_metrics(self.ledger)
        ended = 0
        for name, value in live.items():
            if name.startswith("trials_"):
                ended += int(value)
        writes = self._to("")
        writes.add_metrics(live, event.time, ended)
        now = time.monotonic()
        if now - self.pictured > _PAGE_EVERY_S:
            self.pictured = now
            self.page_work["refresh"] = partial(self.page.refresh, self.ledger, self.history)

    def _put_tested(self, event: NetworkTested) -> None:
        """The test metrics of a front member; where it was pruned, with all its measures, as
        `one_shot_STEP/NAME`."""
        assert self.ledger is not None
        name = label(event.number)
        values = dict(event.metrics)
        if event.step:
            record = self.ledger.by_label[name]
            network = self.ledger.find(record, event.epoch, event.step)
            measures = {**event.metrics, **network.measures}
            values = {}
            for metric, value in measures.items():
                values[f"one_shot_{event.step}/{metric}"] = value
        writes = self._to(name)
        writes.add_metrics(values, event.time, event.epoch)

    def _put_replicated(self, event: NetworkReplicated) -> None:
        """The means and standard deviations over the seeds that are there, as `replicas/NAME_mean`
        and `replicas/NAME_std`; where it was pruned, as `one_shot_STEP/replicas/…`."""
        assert self.ledger is not None
        name = label(event.number)
        record = self.ledger.by_label[name]
        network = self.ledger.find(record, event.epoch, event.step)
        prefix = "replicas"
        if event.step:
            prefix = f"one_shot_{event.step}/replicas"
        seeds = len(network.replicas)
        values = {f"{prefix}/seeds": float(seeds)}
        for measure, spread in replicated(network).items():
            mean, deviation = spread
            values[f"{prefix}/{measure}_mean"] = mean
            if deviation is not None:
                values[f"{prefix}/{measure}_std"] = deviation
        writes = self._to(name)
        writes.add_metrics(values, event.time, event.epoch)

    def _put_timed(self, event: NetworkTimed) -> None:
        """The times of what is recommended, taken again when the search was over, as
        `timed_again/NAME`."""
        times = {}
        for name, value in event.times.items():
            times[f"timed_again/{name}"] = value
        writes = self._to(label(event.number))
        writes.add_metrics(times, event.time, event.epoch)

    def _put_finished(self, event: SessionEnded) -> None:
        self.page_work["finish"] = partial(self._finish, event)

    def _finish(self, event: SessionEnded) -> None:
        """Completes the trials' tags and the page of the search, and then ends the parent run."""
        ledger = self.ledger
        interrupted = event.status == "interrupted"
        assert ledger is not None
        for name, tags in last_tags(ledger).items():
            writes = self._to(name)
            writes.add_tags(tags)
        self.write_queue.send(everything=True)
        finish = partial(
            self.page.finish, ledger, self.history, event.seconds, interrupted=interrupted
        )
        self._on_page(finish)
        self.client.set_tag(self.parent, "slimfront.status", event.status)
        end = _MLFLOW_STATUS[event.status]
        self.client.set_terminated(self.parent, end, end_time=event.time)
        self._look_again(end)

    def _look_again(self, status: str) -> None:
        """Raises MlflowException unless the store has the end that it took: something else may
        answer in MLflow's place."""
        info = self.client.get_run(self.parent).info
        another_run = info.run_id != self.parent
        still_going = info.lifecycle_stage == "active" and info.status != status
        if another_run or still_going:
            raise MlflowException(
                f"the store took all writes and does not have the end of {self.search}"
            )


def _number_in(file: Path) -> int:
    """The number in a file; 0 if there is none, or it is damaged: then everything is delivered
    again, which changes nothing."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _further_epochs(measures: Mapping[str, float]) -> int:
    """For how many epochs a network was trained beside the training that it comes from."""
    epochs = measures.get(RECOVERY_EPOCHS, 0)
    return int(epochs)
