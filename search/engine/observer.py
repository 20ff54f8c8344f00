"""Turns Ray Tune's events into the journal, and passes each on to the records, the recorder, the
study and the progress."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from slimfront.search.engine.driver_only import DriverOnly
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.room import no_room_for_ray, no_room_in
from slimfront.search.record.events import (
    CheckpointMoved,
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworksPruned,
    ProposalRepeated,
    TrialBegan,
    TrialContinued,
    TrialEnded,
)
from slimfront.search.record.journal import Journal
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.storage import delete
from slimfront.search.record.trials import MeasuredNetwork, TrialRecord, label
from slimfront.search.tracking.recorder import Recorder
from slimfront.trainables.messages import Report

log = logging.getLogger(__name__)


class Observer(DriverOnly, tune.Callback):
    """Writes down what happens in the journal first, and then tells everyone else.

    `tell(record)` tells the study how a trial ended, `again(record)` has one suggested once more.
    If the journal cannot be written any more (a full disk), nothing more is believed to have
    happened: the search is asked to end, and `failure` says why.
    """

    def __init__(
        self,
        journal: Journal,
        ledger: Ledger,
        recorder: Recorder,
        interrupt: Interrupt,
        progress: Progress | None,
        retries: int = 0,
        relative: Callable[[str], str] = os.path.relpath,
    ) -> None:
        """`relative` makes the path of a checkpoint, as Ray names it, relative to the search's
        folder."""
        self.relative = relative
        self.journal = journal
        self.ledger = ledger
        self.recorder = recorder
        self.interrupt = interrupt
        self.progress = progress
        self.tell: Callable[[TrialRecord], None] = lambda _record: None
        self.again: Callable[[TrialRecord], None] = lambda _record: None
        self.retries = retries
        self.lost: Counter[str] = Counter()
        self.failure: OSError | None = None

    def write(self, event: Event) -> Event | None:
        """One event to the journal, the records and the recorder; None if the journal takes no
        more."""
        if self.failure is not None:
            return None
        try:
            event = self.journal.append(event)
        except OSError as error:
            self.failure = error
            self.interrupt.requested = True
            return None
        self.ledger.apply(event)
        self.recorder.take(event)
        return event

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial got its process."""
        self._record(trial)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported some epochs; those that it repeats after its process was lost are left
        out."""
        record = self._record(trial)
        report = Report.of(result)
        history = [
            epoch for epoch in report.history if record is None or epoch["epoch"] > record.epoch
        ]
        if history:
            self.write(EpochsReported(number=trial.config["number"], history=history))
        if record is not None and self._matters(record, report, done=bool(result.get("done"))):
            # Ray looks at it next; the network follows in `on_checkpoint`.
            result["should_checkpoint"] = True
        elif record is not None and _was_measured(record, report):
            self._pruned_since(record, report)
        elif record is not None:
            self._point(record, report, None)
        self._show()

    def _matters(self, record: TrialRecord, report: Report, *, done: bool) -> bool:
        """Whether a report must be kept: the trial goes on from there, or a network of it would
        join the front.

        One that would not join it now never will, since only what dominates a member of the front
        takes its place.
        """
        if not done or record.number is None:
            return report.failure is None
        if report.network is None:
            return False
        for network in (report.network, *report.pruned):
            if self.ledger.front.would_join(record, network.measures):
                return True
        return False

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any
    ) -> None:
        """A trial's last report is safe in a checkpoint: its network can ship, and its training can
        go on from there."""
        report = Report.of(trial.last_result or {})
        record = self._record(trial)
        if record is None or report.network is None or report.epoch is None:
            return
        if _was_measured(record, report):  # its process was lost before it went on from there
            known = self.ledger.find(record, report.epoch)
            old = known.checkpoint
            self.write(
                CheckpointMoved(
                    number=record.number,
                    epoch=known.epoch,
                    checkpoint=self.relative(checkpoint.path),
                )
            )
            self._pruned_since(record, report)
            if old is not None and self.failure is None:
                delete(old)
            return
        before = record.resumable
        front_before = [point.origin for point in self.ledger.front.members()]
        self._point(record, report, self.relative(checkpoint.path))
        self._clear([*front_before, *([before] if before else [])])

    def _point(self, record: TrialRecord, report: Report, checkpoint: str | None) -> None:
        """A network was measured, and those pruned from it; they are kept in the checkpoint, or not
        at all."""
        if report.network is None or report.epoch is None:
            return
        self.write(
            NetworkMeasured(
                number=record.number,
                epoch=report.epoch,
                measures=report.network.measures,
                compaction=report.network.compaction,
                checkpoint=checkpoint,
                pruned=[network.as_plain() for network in report.pruned],
            )
        )

    def _pruned_since(self, record: TrialRecord, report: Report) -> None:
        """A network that was measured before turns out to be the last of its trial: what was pruned
        from it joins it."""
        if not report.pruned or report.epoch is None:
            return
        if self.ledger.find(record, report.epoch).pruned:
            return
        pruned = [network.as_plain() for network in report.pruned]
        event = NetworksPruned(number=record.number, epoch=report.epoch, pruned=pruned)
        self.write(event)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial lost its process, and goes on in another from its last checkpoint; or there was
        no room for that."""
        if self._no_room(trial):
            return
        log.warning(
            "%s lost its process (%s); it goes on from its last checkpoint",
            label(trial.config["number"]),
            _reason(trial),
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial ended by itself: completed, or failed with a reason; or it was stopped early."""
        report = Report.of(trial.last_result or {})
        reason = report.failure
        status = "completed"
        if reason:
            status = "failed"
        elif not report.finished:
            status = "stopped"
            reason = f"stopped early after {report.epoch or 0} epochs"
        self._end(trial, status, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial raised or lost its process, once too often; or before it had begun, which Ray
        does not try again."""
        record = self._record(trial)
        if record is None or self._no_room(trial):
            return
        self.lost[record.label] += max(trial.num_failures, 1)
        if self.lost[record.label] <= self.retries:
            log.warning("%s lost its process (%s); it begins again", record.label, _reason(trial))
            self.again(record)
            return
        self._ended(record.number, "failed", _reason(trial))

    def _no_room(self, trial: Trial) -> bool:
        """Whether a trial could not be kept for want of room: then the search ends, and no trial
        has failed."""
        failure = no_room_in(_reason(trial)) or no_room_for_ray()
        if failure is not None:
            self.end(failure)
        return failure is not None

    def end(self, failure: OSError) -> None:
        """Ends the search, which cannot be kept or cannot go on; nothing more is written."""
        self.failure = self.failure or failure
        self.interrupt.requested = True

    def reject(self, number: int, values: dict[str, Any], reason: str) -> None:
        """A trial was proposed whose values make no candidate: it has failed before it could
        start."""
        if label(number) not in self.ledger.by_label:
            self.write(TrialBegan(number=number, values=values, seed=0))
        self._ended(number, "failed", reason)

    def repeat(self, number: int, values: dict[str, Any], first: int) -> bool:
        """A trial was proposed with the values of an earlier one, and is not trained; whether the
        journal has that."""
        event = self.write(ProposalRepeated(number=number, values=values, first=first))
        self._show()
        return event is not None

    def _record(self, trial: Trial) -> TrialRecord | None:
        """The record of a trial, made when it is first heard of: a process can die before the trial
        starts."""
        number = trial.config["number"]
        record = self.ledger.by_label.get(label(number))
        if record is None:
            self.write(
                TrialBegan(
                    number=number,
                    values=trial.config["values"],
                    seed=trial.config["candidate"]["training"]["seed"],
                )
            )
            record = self.ledger.by_label.get(label(number))
        elif record.status != "running" and record.interrupted:
            self.write(TrialContinued(number=number))
        return record

    def _end(self, trial: Trial, status: str, reason: str | None) -> None:
        if self._record(trial) is not None:
            self._ended(trial.config["number"], status, reason)

    def _ended(self, number: int | None, status: str, reason: str | None) -> None:
        event = self.write(TrialEnded(number=number, status=status, reason=reason))
        if event is None:
            return
        record = self.ledger.by_label[label(number)]
        self.tell(record)
        if record.status == "failed":
            log.warning("%s failed: %s", record.label, record.reason)
        self._clear(record.points)
        self._show()

    def _clear(self, points: list[MeasuredNetwork]) -> None:
        """Deletes the checkpoints of those points that are neither on the front nor needed to
        continue a trial."""
        kept = {id(point.origin) for point in self.ledger.front.members()}
        for point in points:
            record = point.trial
            needed = record.unfinished or record is self.ledger.dense
            if (
                point.checkpoint is None
                or id(point) in kept
                or (needed and point is record.resumable)
            ):
                continue
            delete(point.checkpoint)
            point.checkpoint = None

    def _show(self) -> None:
        if self.progress:
            self.progress.update(self.ledger)


def _was_measured(record: TrialRecord, report: Report) -> bool:
    return any(point.epoch == report.epoch for point in record.points)


def _reason(trial: Trial) -> str:
    """The first sentence of the last line of the error of a trial that raised (`ValueError: …`), or
    why its process died."""
    # trial.get_error() reads the synced copy, which is not there yet when Tune calls back; this is
    # the driver's own.
    file = Path(trial.error_file or "")
    lines = []
    if file.is_file():
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    said = _SILENT
    if lines:
        said = re.split(r"[.] (?=[A-Z])", lines[-1])[0]
    if said.startswith(_RAY_S):
        return _SILENT
    return said


_SILENT = "it ended without saying why: it crashed, or was killed, perhaps for want of memory"
_RAY_S = (
    "The actor is dead because its worker process has died",
    "The actor died unexpectedly before finishing this task",
)
"""How Ray says so."""
