"""What is known of one trial, and of the networks that it passed through."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimfront.search.record.storage import fetch
from slimfront.trainables.shipping.network_file import network_file

Status = Literal["running", "completed", "stopped", "failed"]

Measures = dict[str, float]
"""Measures and metrics by name, such as `params` and `val_f1`."""


def label(number: int | None) -> str:
    """The name of trial `number`: trial-007; the dense reference has no number."""
    if number is None:
        return "dense"
    return f"trial-{number:03d}"


@dataclass(eq=False)
class MeasuredNetwork:
    """A network that a trial passed through: compact, measured, and kept in a checkpoint as it
    could ship.

    `pruned` are the networks that one-shot pruning made of it, `step` 1 and on, which share the
    checkpoint of their `source`.
    """

    trial: "TrialRecord" = field(repr=False)
    epoch: int
    measures: Measures
    compaction: list[list[str]]
    checkpoint: str | None
    tested: Measures | None = None
    """The metrics on the test split, such as `test_f1`, and standard errors of the quality, such as
    `val_f1_se`, once they were taken."""
    timed_again: Measures | None = None
    """The measures that are times, taken in quiet when a search that recommended it, or might have,
    was over."""
    each_time: list[Measures] = field(default_factory=list, repr=False)
    """The several times that those are the means of."""
    step: int = 0
    pruned: list["MeasuredNetwork"] = field(default_factory=list, repr=False)
    source: "MeasuredNetwork | None" = field(default=None, repr=False)
    replicas: dict[int, Measures] = field(default_factory=dict)
    """Its measures when it was trained anew, by seed."""

    @property
    def name(self) -> str:
        """How people see it: trial-007, with @ and the epoch where it is not the trial's last, and
        / and the one-shot step."""
        name = self.trial.label
        ended = self.origin is self.trial.last and self.trial.status == "completed"
        if not ended:
            name += f"@{self.epoch}"
        if self.step:
            name += f"/{self.step}"
        return name

    @property
    def origin(self) -> "MeasuredNetwork":
        """The network that came out of training: itself, or the one that it was pruned from."""
        return self.source or self

    def mean(self, name: str) -> float:
        """A measure, by the mean of its replicas where there are any: that one was chosen because
        it is good flatters the first training, and not these."""
        if not self.replicas:
            return self.measures[name]
        values = [measures[name] for measures in self.replicas.values()]
        return statistics.fmean(values)

    def deviation(self, name: str) -> float | None:
        """The standard deviation of a measure or metric over its replicas; None with fewer than
        two."""
        values = []
        for measures in self.replicas.values():
            if name in measures:
                values.append(measures[name])
        if len(values) < 2:
            return None
        return statistics.stdev(values)

    @property
    def file(self) -> Path | None:
        """Where its network is stored, or a copy from a bucket; None if it was deleted. Raises
        UserError without a copy."""
        checkpoint = self.origin.checkpoint
        if checkpoint is None:
            return None
        return fetch(checkpoint, network_file(self.step))


def replicated(network: MeasuredNetwork) -> dict[str, tuple[float, float | None]]:
    """The mean over the replicas of a network, and the standard deviation, of each metric on the
    validation and the test split and of the non-zero parameters; empty without replicas."""
    if not network.replicas:
        return {}
    first = next(iter(network.replicas.values()))
    names = [name for name in first if name.startswith(("val_", "test_"))]
    found = {}
    for name in (*names, "nonzero_params"):
        mean = network.mean(name)
        deviation = network.deviation(name)
        found[name] = (mean, deviation)
    return found


@dataclass(eq=False)
class TrialRecord:
    """One trial. `number` is Optuna's, and None for the dense reference; `values` are the searched
    ones by dotted path."""

    number: int | None
    values: dict[str, Any]
    seed: int
    status: Status = "running"
    reason: str | None = None
    points: list[MeasuredNetwork] = field(default_factory=list)
    epoch: int = 0
    """The last epoch that was reported."""
    interrupted: bool = False

    @property
    def label(self) -> str:
        """How people see it: trial-007, or dense."""
        return label(self.number)

    @property
    def last(self) -> MeasuredNetwork | None:
        """The last network that it was measured as."""
        if self.points:
            return self.points[-1]
        return None

    @property
    def resumable(self) -> MeasuredNetwork | None:
        """The last network that was kept, with the training that can go on from there."""
        for point in reversed(self.points):
            if point.checkpoint is not None:
                return point
        return None

    @property
    def measures(self) -> Measures:
        """The measures of its last network; empty if it has none."""
        last = self.last
        if last:
            return last.measures
        return {}

    @property
    def unfinished(self) -> bool:
        """Whether it would be continued by a resume."""
        return self.status == "running" or self.interrupted
