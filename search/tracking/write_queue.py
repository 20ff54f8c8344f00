"""What waits to be written to the runs of a search, put together so that MLflow is called as seldom
as possible."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from slimfront.search.record.storage import NO_ROOM
from slimfront.search.tracking.store import is_of_a_store
from slimfront.trainables.errors import first_line

log = logging.getLogger(__name__)

PERMANENT_ERRORS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
}
"""MLflow's error codes of writes that would fail again."""
_LOOK_AFTER = 20
"""So many runs are written to before it is looked whether MLflow has taken it."""
_COLLECT_S = 3.0
"""How long a pending write to a run that goes on waits for more."""


@dataclass
class PendingWrites:
    """Everything that waits for one run."""

    first_event: int
    """The number of the first event that it tells of."""
    begun: float = field(default_factory=time.monotonic)
    creation: dict[str, Any] | None = None
    """The arguments of `create_run`, where the run may be new."""
    entries: list[Metric | Param] = field(default_factory=list)
    """All but tags."""
    tags: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    ended: int | None = None
    """When the run ended, in milliseconds; None while it runs."""

    def add_metrics(self, values: Mapping[str, float], time: int, step: int) -> None:
        """Metrics of one step; the time in milliseconds."""
        for name, value in values.items():
            self.entries.append(Metric(name, float(value), time, step))

    def add_params(self, values: Mapping[str, Any]) -> None:
        """Params, which never change."""
        for name, value in values.items():
            self.entries.append(param(name, value))

    def add_tags(self, values: Mapping[str, str]) -> None:
        """Tags; the last of a name counts."""
        self.tags |= values


def param(path: str, value: object) -> Param:
    """A param as MLflow takes it: without the quotes and brackets of keys that have dots, and with
    `_` in the place of what no name may have, such as a `*`."""
    opened = re.sub(r"""\[["']""", ".", path)
    plain = re.sub(r"""["']\]""", "", opened)
    name = re.sub(r"[^\w\-. :/]", "_", plain)
    return Param(name, str(value))


class WriteQueue:
    """What is to be written, by run, by the label of its trial; the parent's is ''.

    Writing something again changes nothing in MLflow, so what was
    written in part is written again.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        run_ids: dict[str, str],
        *,
        embedded: bool = True,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`run_ids` are the ids of the runs that are there, by label; those made here are added to
        it.

        Args:
            embedded: whether the store is in this process: then nothing else can answer in its
                place.
            may_write: raises Superseded once another driver has the search, and is asked before
                each run is written to. MLflow itself cannot refuse a driver.
        """
        self.client = client
        self.may_write = may_write
        self.embedded = embedded
        self.experiment_id = experiment_id
        self.run_ids = run_ids
        self.pending: dict[str, PendingWrites] = {}
        self.refused: list[str] = []
        """What MLflow refused for good, by the names of runs and of what they were to get."""

    def to(self, label: str, event: int) -> PendingWrites:
        """The writes that wait for a run, to which something of the event of that number is
        added."""
        return self.pending.setdefault(label, PendingWrites(event))

    def done(self, event: int) -> int:
        """The number of the last event of which, like of all before it, nothing waits, if `event`
        was the last of all."""
        waiting = [writes.first_event for writes in self.pending.values()]
        if not waiting:
            return event
        return min(waiting) - 1

    def send(self, *, everything: bool) -> None:
        """Writes what is pending of runs that ended, and what has waited for a while, or all, in
        at most three calls each; it waits no longer once it is sure that MLflow took it.

        What MLflow refuses for good is left out with a warning.

        Raises:
            Exception: what the store raises if it does not answer; what is not sent then still
                waits.
        """
        ripe = time.monotonic() - _COLLECT_S
        sent: list[str] = []
        for label, writes in list(self.pending.items()):
            if everything or writes.ended is not None or writes.begun <= ripe:
                self._send(label, writes)
                sent.append(label)
            if len(sent) >= _LOOK_AFTER:
                self._settle(sent)
        self._settle(sent)

    def _settle(self, sent: list[str]) -> None:
        if sent:
            self.look()
        for label in sent:
            del self.pending[label]
        sent.clear()

    def look(self) -> None:
        """Raises MlflowException unless it is still MLflow that answers: a page to log in, or
        another server at the same address, takes every write, or refuses it, as MLflow would."""
        if self.embedded:
            return
        found = self.client.get_experiment(self.experiment_id)
        if str(found.experiment_id) != str(self.experiment_id):
            raise MlflowException("what answers now is no MLflow server, or another one")

    def _send(self, label: str, writes: PendingWrites) -> None:
        self.may_write()
        creation = writes.creation
        if creation is not None and label not in self.run_ids:
            run = self.unless_refused(
                f"the run {label}", lambda: self.client.create_run(self.experiment_id, **creation)
            )
            # Whatever stands in MLflow's place, such as a page to log in.
            if run is not None and not run.info.run_id:
                raise MlflowException(f"the store made the run {label} and gave it no id")
            if run is not None:
                self.run_ids[label] = run.info.run_id
        if label in self.run_ids:
            self._fill(label, self.run_ids[label], writes)

    def _fill(self, label: str, run_id: str, writes: PendingWrites) -> None:
        tags = [RunTag(name, value) for name, value in writes.tags.items()]
        self.log(label, run_id, [*writes.entries, *tags])
        if writes.status is None:
            return
        if writes.ended is None:
            update = partial(self.client.update_run, run_id, status=writes.status)
            self.unless_refused(f"the status of {label}", update)
        else:
            end = partial(self.client.set_terminated, run_id, writes.status, end_time=writes.ended)
            self.unless_refused(f"the end of {label}", end)

    def log(self, label: str, run_id: str, entries: Sequence[Metric | Param | RunTag]) -> None:
        """Writes values to a run; those that MLflow refuses are left out, with one warning that
        names them."""
        refused = self._refused(run_id, entries)
        if not refused:
            return
        _, why = refused[0]
        names = list(dict.fromkeys(name for name, _ in refused))
        whose = label or "the search"
        for name in names:
            self.refused.append(f"{name} of {whose}")
        shown = names[:5]
        if len(names) > 5:
            shown.append("…")
        log.warning(
            "MLflow refused %d values of %s: %s (%s); the search goes on without them",
            len(refused),
            whose,
            ", ".join(shown),
            why,
        )

    def _refused(
        self, run_id: str, entries: Sequence[Metric | Param | RunTag]
    ) -> list[tuple[str, str]]:
        """Writes a batch; if it is refused, its halves, until only what MLflow cannot take is left:
        its names, and why."""
        if not entries:
            return []
        try:
            self.client.log_batch(
                run_id,
                metrics=[entry for entry in entries if isinstance(entry, Metric)],
                params=[entry for entry in entries if isinstance(entry, Param)],
                tags=[entry for entry in entries if isinstance(entry, RunTag)],
            )
        except MlflowException as error:
            if not self._is_hopeless(error):
                raise
            if len(entries) == 1:
                return [(entries[0].key, first_line(error))]
            half = len(entries) // 2
            first = self._refused(run_id, entries[:half])
            second = self._refused(run_id, entries[half:])
            return first + second
        return []

    def unless_refused(self, what: str, write: Callable[[], Any]) -> Any:
        """What the write returns; None, with a warning, if MLflow would refuse it again: then
        `what` is added to `refused`."""
        try:
            return write()
        except MlflowException as error:
            if not self._is_hopeless(error):
                raise
            log.warning(
                "MLflow refused %s (%s); the search goes on without it", what, first_line(error)
            )
            self.refused.append(what)
            return None

    def _is_hopeless(self, error: MlflowException) -> bool:
        """Whether it is MLflow that refuses a write, and would again."""
        if error.error_code not in PERMANENT_ERRORS:
            return False
        self.look()
        return True


class Impossible(Exception):
    """Something that was to be written cannot be made here; MLflow has nothing to do with it, and
    trying again does not help."""


@contextmanager
def making(what: str) -> Iterator[None]:
    """Around what is computed before it is written: whatever goes wrong there becomes
    `Impossible`, but for a want of room, which passes."""
    try:
        yield
    except Exception as error:  # pictures, exporters and compilers raise many kinds
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise Impossible(f"{what} cannot be made ({first_line(error)})") from error


def unless_impossible(what: str, work: Callable[[], None]) -> None:
    """Does it; what cannot be made is left out, with one warning that names it.

    Raises:
        Exception: what the store raises if it does not answer.
    """
    try:
        work()
    except Impossible as error:
        log.warning("%s: it is not in MLflow", error)
    except Exception as error:
        if is_of_a_store(error):
            raise
        log.warning("%s cannot be written (%s): it is not in MLflow", what, first_line(error))
