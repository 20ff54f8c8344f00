"""What is known about the trials of a search while it runs, and the front of those that completed."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from search.objectives import Objective, losses
from search.pareto import hypervolume, non_dominated

Status = Literal["running", "completed", "stopped", "failed"]


def label(number: int | None) -> str:
    """The name of trial `number`: trial-007; the dense reference has no number."""
    return "dense" if number is None else f"trial-{number:03d}"


@dataclass
class TrialRecord:
    """One trial. `number` is Optuna's, and None for the dense reference; `values` are the searched ones by dotted path."""

    number: int | None
    values: dict[str, Any]
    seed: int
    status: Status = "running"
    reason: str | None = None
    measures: dict[str, float] = field(default_factory=dict)
    compaction: list[list[str]] = field(default_factory=list)
    checkpoint: str | None = None
    run_id: str | None = None
    test_accuracy: float | None = None

    @property
    def label(self) -> str:
        """How people see it: trial-007, or dense."""
        return label(self.number)


class Ledger:
    """The trials of one search, and its front and hypervolume; `dense_sizes` scale the losses (see `Objective.loss`)."""

    def __init__(self, objectives: list[Objective], dense_sizes: dict[str, float]) -> None:
        self.objectives = objectives
        self.dense_sizes = dense_sizes
        self.dense: TrialRecord | None = None
        self.trials: list[TrialRecord] = []

    def add(self, record: TrialRecord) -> None:
        """Takes in a trial that starts."""
        if record.number is None:
            self.dense = record
        else:
            self.trials.append(record)

    def with_status(self, status: Status) -> list[TrialRecord]:
        """The trials of that status; the dense reference is not among them."""
        return [trial for trial in self.trials if trial.status == status]

    def front(self) -> list[TrialRecord]:
        """The non-dominated completed trials, most accurate first."""
        completed = self.with_status("completed")
        on_front = non_dominated(self._losses(completed))
        members = [trial for trial, keep in zip(completed, on_front, strict=True) if keep]
        return sorted(members, key=lambda t: (-t.measures["val_accuracy"], t.measures["nonzero_params"], t.number or 0))

    def hypervolume(self) -> float:
        """The front's hypervolume on the scale of `Objective.loss`, from 0 (no better than dense) to 1."""
        return hypervolume(self._losses(self.with_status("completed")), np.ones(len(self.objectives)))

    def _losses(self, trials: list[TrialRecord]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return losses([trial.measures for trial in trials], self.objectives, self.dense_sizes)


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended."""

    search: str
    ledger: Ledger
    front: list[TrialRecord]
    wall_seconds: float
    tracking_uri: str
    interrupted: bool

    @property
    def all_failed(self) -> bool:
        """Whether no trial completed though none was stopped: the exit code of the command is then 1."""
        return not self.ledger.with_status("completed") and not self.interrupted
