"""What waits to be written to the runs of a search, put together so that MLflow is called as seldom as possible."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

_HOPELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
"""MLflow's error codes of writes that would fail again."""
_COLLECT_S = 3.0
"""How long a letter to a run that goes on waits for more."""


@dataclass
class Letter:
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
        self.entries += [Metric(name, float(value), time, step) for name, value in values.items()]

    def add_params(self, values: Mapping[str, Any]) -> None:
        """Params, which never change."""
        self.entries += [Param(name, str(value)) for name, value in values.items()]

    def add_tags(self, values: Mapping[str, str]) -> None:
        """Tags; the last of a name counts."""
        self.tags |= values


class Outbox:
    """One letter per run, by the label of its trial; the parent's is ''.

    Sending a letter again changes nothing in MLflow, so one that was sent in part is sent again whole.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, run_ids: dict[str, str]) -> None:
        """`run_ids` are the ids of the runs that are there, by label; those made here are added to it."""
        self.client = client
        self.experiment_id = experiment_id
        self.run_ids = run_ids
        self.letters: dict[str, Letter] = {}

    def to(self, label: str, event: int) -> Letter:
        """The letter that waits for a run, to which something of the event of that number is added."""
        return self.letters.setdefault(label, Letter(event))

    def done(self, event: int) -> int:
        """The number of the last event of which, like of all before it, nothing waits, if `event` was the last of all."""
        return min((letter.first_event - 1 for letter in self.letters.values()), default=event)

    def send(self, *, everything: bool) -> None:
        """Writes the letters of runs that ended and those that have waited for a while, or all, in at most three calls each.

        What MLflow refuses for good is left out with a warning.

        Raises:
            Exception: what the store raises if it does not answer; what is not sent then still waits.
        """
        ripe = time.monotonic() - _COLLECT_S
        for label, letter in list(self.letters.items()):
            if everything or letter.ended is not None or letter.begun <= ripe:
                self._send(label, letter)
                del self.letters[label]

    def _send(self, label: str, letter: Letter) -> None:
        creation = letter.creation
        if creation is not None and label not in self.run_ids:
            run = unless_refused(lambda: self.client.create_run(self.experiment_id, **creation))
            if run is not None:
                self.run_ids[label] = run.info.run_id
        if label in self.run_ids:
            self._fill(label, self.run_ids[label], letter)

    def _fill(self, label: str, run_id: str, letter: Letter) -> None:
        tags = [RunTag(name, value) for name, value in letter.tags.items()]
        refused = self._log(run_id, [*letter.entries, *tags])
        if refused:
            log.warning("MLflow refused %d values of %s (%s); the search goes on without them", len(refused), label, refused[0])
        if letter.status is not None and letter.ended is None:
            unless_refused(lambda: self.client.update_run(run_id, status=letter.status))
        elif letter.status is not None:
            unless_refused(lambda: self.client.set_terminated(run_id, letter.status, end_time=letter.ended))

    def _log(self, run_id: str, entries: Sequence[Metric | Param | RunTag]) -> list[str]:
        """Writes a batch; if it is refused, its halves, until only what MLflow cannot take is left. What MLflow said of each."""
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
            if not _is_hopeless(error):
                raise
            if len(entries) == 1:
                return [first_line(error)]
            half = len(entries) // 2
            return self._log(run_id, entries[:half]) + self._log(run_id, entries[half:])
        return []


def unless_refused(write: Callable[[], Any]) -> Any:
    """What the write returns; None, with a warning, if MLflow would refuse it again."""
    try:
        return write()
    except MlflowException as error:
        if not _is_hopeless(error):
            raise
        log.warning("MLflow refused a write (%s); the search goes on without it", first_line(error))
        return None


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _is_hopeless(error: MlflowException) -> bool:
    return error.error_code in _HOPELESS
