"""Turns Ray Tune's events into records, and passes them on to the recorder and the progress display."""

import logging
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial

from search.driver_only import DriverOnly
from search.records import Ledger, TrialRecord
from search.tracking import Recorder
from trainables.measures import MEASURES

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Whoever shows how the search goes."""

    def update(self, ledger: Ledger) -> None:
        """Called when a trial starts, reports or ends."""


class Observer(DriverOnly, tune.Callback):
    """Turns Tune's events into records, and passes them to the recorder and to the progress display."""

    def __init__(self, ledger: Ledger, recorder: Recorder, progress: Progress | None) -> None:
        self.ledger = ledger
        self.recorder = recorder
        self.progress = progress
        self.records: dict[str, TrialRecord] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial got its process."""
        self._record(trial)
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """A trial reported some epochs."""
        self.recorder.log_epochs(self._record(trial), result.get("history", []))
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended by itself: completed, or failed with a reason."""
        result, record = trial.last_result or {}, self._record(trial)
        record.measures = {name: result[name] for name in ("val_accuracy", *MEASURES, "layers_merged") if name in result}
        record.compaction = result.get("compaction", [])
        record.reason = result.get("failure")
        record.status = "failed" if record.reason else "completed"
        record.checkpoint = trial.checkpoint.path if trial.checkpoint else None
        self._end(record)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial raised, or lost its process."""
        record = self._record(trial)
        record.status, record.reason = "failed", _reason(trial)
        self._end(record)

    def reject(self, number: int, values: dict[str, Any], reason: str) -> None:
        """A trial was proposed whose values make no candidate: it has failed before it could start."""
        record = TrialRecord(number, values, seed=0, status="failed", reason=reason)
        self.ledger.add(record)
        self.recorder.start_trial(record)
        self._end(record)

    def _record(self, trial: Trial) -> TrialRecord:
        """The record of a trial, made when it is first heard of: a process can die before the trial starts."""
        if trial.trial_id not in self.records:
            config = trial.config
            record = TrialRecord(config["number"], config["values"], config["candidate"]["training"]["seed"])
            self.records[trial.trial_id] = record
            self.ledger.add(record)
            self.recorder.start_trial(record)
        return self.records[trial.trial_id]

    def _end(self, record: TrialRecord) -> None:
        if record.status == "failed":
            log.warning("%s failed: %s", record.label, record.reason)
        self.recorder.end_trial(record, self.ledger)
        self._show()

    def _show(self) -> None:
        if self.progress:
            self.progress.update(self.ledger)


def _reason(trial: Trial) -> str:
    """The last line of the error of a trial that raised, such as `ValueError: …`, or why its process died."""
    # trial.get_error() reads the synced copy, which is not there yet when Tune calls back; this is the driver's own.
    file = Path(trial.error_file or "")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []
    return lines[-1] if lines else "the trial's process ended without saying why"
