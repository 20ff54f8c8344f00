"""What is known about the trials of a search, as its journal tells it, and the front of the
networks they passed through."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective, losses
from slimfront.search.record.events import (
    CheckpointMoved,
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworkReplicated,
    NetworkTested,
    NetworkTimed,
    OfTrial,
    ProposalRepeated,
    TrialBegan,
    TrialContinued,
    TrialEnded,
    TrialInterrupted,
)
from slimfront.search.record.pareto import Points, hypervolume, knee
from slimfront.search.record.storage import fetch, join
from slimfront.trainables.shipping.network_file import network_file

Status = Literal["running", "completed", "stopped", "failed"]
REGION = 5
"""So many tolerances below the baseline's quality ends the region that matters."""


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
    measures: dict[str, float]
    compaction: list[list[str]]
    checkpoint: str | None
    tested: dict[str, float] | None = None
    """The metrics on the test split, such as `test_f1`, and standard errors of the quality, such as
    `val_f1_se`, once they were taken."""
    timed_again: dict[str, float] | None = None
    """The measures that are times, taken in quiet when a search that recommended it was over."""
    step: int = 0
    pruned: list["MeasuredNetwork"] = field(default_factory=list, repr=False)
    source: "MeasuredNetwork | None" = field(default=None, repr=False)
    replicas: dict[int, dict[str, float]] = field(default_factory=dict)
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
        return statistics.fmean(measures[name] for measures in self.replicas.values())

    def deviation(self, name: str) -> float | None:
        """The standard deviation of a measure or metric over its replicas; None with fewer than
        two."""
        values = [measures[name] for measures in self.replicas.values() if name in measures]
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
        found[name] = (network.mean(name), network.deviation(name))
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
    def measures(self) -> dict[str, float]:
        """The measures of its last network; empty if it has none."""
        if self.last:
            return self.last.measures
        return {}

    @property
    def unfinished(self) -> bool:
        """Whether it would be continued by a resume."""
        return self.status == "running" or self.interrupted


class Ledger:
    """The trials of one search, and the front and hypervolume of their networks.

    The front is taken over every network that was measured, of whatever trial: one that was stopped
    early, or failed later, may have passed through a good one. The part of it that matters is the
    region: what is worse than the baseline by at most five tolerances.

    `dense_sizes` scale the losses (see `Objective.loss`): the measures of the dense network, and
    its metrics, of which those of the trained one replace those of the untrained one as they come.
    Checkpoints are given relative to `place`, a directory or a URI, so that a search can be moved.
    """

    def __init__(
        self,
        objectives: list[Objective],
        dense_sizes: dict[str, float],
        constraints: Iterable[Constraint] = (),
        place: str = ".",
        quality: Objective | None = None,
        tolerance: float = 0.01,
    ) -> None:
        """`quality` is the first metric of the task; if None, the first among the objectives, or
        that of classification. A network is about as good as the baseline if it is worse by at most
        `tolerance` (see `Objective.near`)."""
        self.tolerance = tolerance
        self.objectives = objectives
        metrics = [objective for objective in objectives if objective.measure.quality]
        self.quality = quality or next(iter([*metrics, *OBJECTIVES.values()]))
        self.dense_sizes = dict(dense_sizes)
        self.constraints = list(constraints)
        self.place = place
        self.planned = 0
        """How many trials there are to be."""
        self.dense: TrialRecord | None = None
        self.trials: list[TrialRecord] = []
        self.counts: Counter[Status] = Counter()
        """How many of them have each status: asked at every event, when they may be thousands."""
        self.by_label: dict[str, TrialRecord] = {}
        self.repeated: dict[int, ProposalRepeated] = {}
        """Proposals that were not trained, since an earlier trial has their values, by number."""
        self._front: list[MeasuredNetwork] = []
        self._losses: Points = np.empty((0, len(objectives)))
        """Those of the front's members, (members, objectives)."""
        self._reference = np.ones(len(objectives))
        """The losses at which the region that matters ends, (objectives,)."""
        self._hypervolume = _Hypervolume()
        self._gained = self._hypervolume.progress
        self.since_gain = 0
        """How many trials have ended since the hypervolume last rose."""

    def apply(self, event: Event) -> None:
        """Takes in one event of the journal; those that are not about trials change nothing.

        Raises:
            KeyError: if its trial did not begin.
            StopIteration: if its network was not measured.
        """
        if isinstance(event, TrialBegan):
            self._add(TrialRecord(event.number, event.values, event.seed))
            return
        if isinstance(event, ProposalRepeated):
            self.repeated[event.number] = event
            return
        if not isinstance(event, OfTrial):
            return
        record = self.by_label[label(event.number)]
        match event:
            case EpochsReported():
                epochs = [int(epoch["epoch"]) for epoch in event.history]
                record.epoch = max([record.epoch, *epochs])
            case NetworkMeasured():
                self._add_point(record, event)
            case CheckpointMoved():
                self.find(record, event.epoch).checkpoint = self._path(event.checkpoint)
            case TrialEnded():
                self._end(record, event)
            case TrialInterrupted():
                self._becomes(record, "stopped", "interrupted", interrupted=True)
            case TrialContinued():
                self._becomes(record, "running")
            case NetworkTested():
                network = self.find(record, event.epoch, event.step)
                network.tested = event.metrics
            case NetworkReplicated():
                network = self.find(record, event.epoch, event.step)
                network.replicas[event.seed] = event.measures
            case NetworkTimed():
                network = self.find(record, event.epoch, event.step)
                network.timed_again = event.times

    def _end(self, record: TrialRecord, event: TrialEnded) -> None:
        self._becomes(record, event.status, event.reason)
        if record.number is None:
            return
        progress = self._hypervolume.progress
        self.since_gain = 0 if progress > self._gained else self.since_gain + 1
        self._gained = progress

    def _path(self, checkpoint: str | None) -> str | None:
        if checkpoint is None:
            return None
        return join(self.place, checkpoint)

    @staticmethod
    def find(record: TrialRecord, epoch: int, step: int = 0) -> MeasuredNetwork:
        """The network of a trial that was measured after so many epochs, or one pruned from it.
        Raises StopIteration if none."""
        point = next(point for point in record.points if point.epoch == epoch)
        if step:
            return next(pruned for pruned in point.pruned if pruned.step == step)
        return point

    def _add(self, record: TrialRecord) -> None:
        self.by_label[record.label] = record
        if record.number is None:
            self.dense = record
        else:
            self.trials.append(record)
            self.counts[record.status] += 1

    def _becomes(
        self,
        record: TrialRecord,
        status: Status,
        reason: str | None = None,
        *,
        interrupted: bool = False,
    ) -> None:
        if record.number is not None:
            self.counts[record.status] -= 1
            self.counts[status] += 1
        record.status = status
        record.reason = reason
        record.interrupted = interrupted

    def _add_point(self, record: TrialRecord, event: NetworkMeasured) -> None:
        point = MeasuredNetwork(
            trial=record,
            epoch=event.epoch,
            measures=event.measures,
            compaction=event.compaction,
            checkpoint=self._path(event.checkpoint),
        )
        for step, pruned in enumerate(event.pruned, start=1):
            further = MeasuredNetwork(
                record,
                point.epoch,
                pruned["measures"],
                [*point.compaction, *pruned["compaction"]],
                checkpoint=None,
                step=step,
                source=point,
            )
            point.pruned.append(further)
        record.points.append(point)
        if record.number is None:
            self._rescale(point.measures)
            return
        # Each of them, and not only until one enters.
        entered = [self._enters_front(network) for network in (point, *point.pruned)]
        if any(entered):
            self._hypervolume = self._computed_hypervolume()

    def _computed_hypervolume(self) -> "_Hypervolume":
        full = hypervolume(self._losses, np.ones(len(self.objectives)))
        largest = float(self._reference.prod())
        if largest == 1.0:
            return _Hypervolume(full, full)
        within = hypervolume(self._losses, self._reference) / largest if largest else 0.0
        return _Hypervolume(within, full)

    def _rescale(self, dense: dict[str, float]) -> None:
        """The quality of the dense network is known now: the region ends at five tolerances below
        it, and metrics that are no shares count relative to it. Who is on the front is not changed
        by it, and the hypervolume is."""
        relative = [o.name for o in self.objectives if o.measure.scale == "relative"]
        known = {name: dense[name] for name in relative if math.isfinite(dense.get(name, math.nan))}
        self.dense_sizes |= known
        self._reference = self._end_of_region(dense)
        measures = [point.measures for point in self._front]
        self._losses = losses(measures, self.objectives, self.dense_sizes)
        self._hypervolume = self._computed_hypervolume()
        self._gained = min(self._gained, self._hypervolume.progress)

    def _end_of_region(self, dense: dict[str, float]) -> Points:
        """The losses at which the region ends, (objectives,): those of a network as large as the
        dense one, and worse than it by five tolerances; as before where its quality is no
        number."""
        value = dense.get(self.quality.name, math.nan)
        if not math.isfinite(value):
            return self._reference
        ends = np.ones(len(self.objectives))
        bound = self.quality.near(value, REGION * self.tolerance)
        for index, objective in enumerate(self.objectives):
            if objective.name == self.quality.name:
                ends[index] = min(1.0, objective.loss(bound, value))
        return ends

    def would_enter_front(self, record: TrialRecord, measures: dict[str, float]) -> bool:
        """Whether a network of the trial with these measures would join the front; one that would
        not now never will."""
        if record.number is None:
            return False
        return self._loss_on_front(record, measures) is not None

    @property
    def dense_network(self) -> MeasuredNetwork | None:
        """The last network that the dense reference was measured as; None if there is none yet."""
        if self.dense is None:
            return None
        return self.dense.last

    def _loss_on_front(self, record: TrialRecord, measures: dict[str, float]) -> Points | None:
        """The losses of a network that meets the constraints, and is not dominated or as good as an
        earlier one of its trial."""
        loss: Points = losses([measures], self.objectives, self.dense_sizes)[0]
        if not np.isfinite(loss).all():
            return None
        if not all(constraint.met_by(measures) for constraint in self.constraints):
            return None
        no_worse = (self._losses <= loss).all(axis=1)
        for member in np.flatnonzero(no_worse):
            better = (self._losses[member] < loss).any()
            if better or self._front[member].trial is record:
                return None
        return loss

    def _enters_front(self, point: MeasuredNetwork) -> bool:
        loss = self._loss_on_front(point.trial, point.measures)
        if loss is None:
            return False
        no_better = (loss <= self._losses).all(axis=1)
        worse = (loss < self._losses).any(axis=1)
        stay = np.flatnonzero(~(no_better & worse))
        self._front = [self._front[member] for member in stay]
        self._front.append(point)
        self._losses = np.vstack([self._losses[stay], loss])
        return True

    def with_status(self, status: Status) -> list[TrialRecord]:
        """The trials of that status; the dense reference is not among them."""
        return [trial for trial in self.trials if trial.status == status]

    def front(self) -> list[MeasuredNetwork]:
        """The non-dominated networks that meet the constraints, best first."""
        return [self._front[index] for index in self._order()]

    def _order(self) -> list[int]:
        def key(index: int) -> tuple[float, float, int]:
            point = self._front[index]
            quality = self.quality.goodness(point.measures[self.quality.name])
            return (
                math.inf if math.isnan(quality) else -quality,
                point.measures["nonzero_params"],
                point.trial.number or 0,
            )

        return sorted(range(len(self._front)), key=key)

    def knee(self) -> MeasuredNetwork | None:
        """The member below which quality falls fastest (see `pareto.knee`), of those in the region
        that matters, or of all where none is in it; None without a front."""
        order = self._order()
        if not order:
            return None
        order = [index for index in order if self.in_region(self._front[index])] or order
        place = knee(self._losses[order])
        return self._front[order[place]]

    def is_near(self, point: MeasuredNetwork) -> bool:
        """Whether a network is about as good as the baseline: worse by at most a tolerance."""
        return self._is_within(point, 1)

    def in_region(self, point: MeasuredNetwork) -> bool:
        """Whether a network is worse than the baseline by at most five tolerances: somebody may
        ship it."""
        return self._is_within(point, REGION)

    def quality_within(self, tolerances: int) -> float:
        """The quality that is worse than the baseline's by so many tolerances; NaN before that was
        measured."""
        baseline = self.dense_network
        if baseline is None:
            return math.nan
        value = baseline.mean(self.quality.name)
        return self.quality.near(value, tolerances * self.tolerance)

    def _is_within(self, point: MeasuredNetwork, tolerances: int) -> bool:
        bound = self.quality_within(tolerances)
        return self.quality.as_good(point.mean(self.quality.name), bound)

    def region_text(self) -> str:
        """How far the region reaches below the baseline's quality, as people read it."""
        return self.quality.tolerance_text(REGION * self.tolerance)

    def outside_region(self, epoch: int, measures: Mapping[str, Any]) -> float:
        """By how much a network with these measures, after so many epochs, misses the region around
        the baseline's own quality at that epoch, in the metric's unit; 0 or less is inside, and 0
        where the baseline was not measured then, +inf without a quality."""
        name = self.quality.name
        quality = float(measures.get(name, math.nan))
        if math.isnan(quality):
            return math.inf
        points = self.dense.points if self.dense else []
        for baseline in points:
            if baseline.epoch == epoch and math.isfinite(baseline.measures[name]):
                bound = self.quality.near(baseline.measures[name], REGION * self.tolerance)
                return self.quality.goodness(bound) - self.quality.goodness(quality)
        return 0.0

    def recommended(self) -> MeasuredNetwork | None:
        """The smallest member of the front, by the first objective that is no metric, that is about
        as good as the baseline; where there is none, the best there is. Judged by the means of
        replicas where there are any. None without a front."""
        front = self.front()
        near = [point for point in front if self.is_near(point)]
        if not near:
            name = self.quality.name
            return max(
                front, key=lambda point: self.quality.goodness(point.mean(name)), default=None
            )
        sizes = [objective for objective in self.objectives if not objective.measure.quality]
        size = sizes[0] if sizes else OBJECTIVES["nonzero_params"]
        # Of several of one size, the best: it comes first.
        return max(near, key=lambda point: size.goodness(point.measures[size.name]))

    def hypervolume(self) -> float:
        """The front's hypervolume within the region that matters, from 0 (nothing there is smaller
        than dense) to 1: the losses (see `Objective.loss`) are taken relative to their reference,
        which is at the dense network's sizes and at five tolerances below its quality. That of the
        whole front while the baseline's quality is not known."""
        return self._hypervolume.within

    def hypervolume_full(self) -> float:
        """That of the whole front, whose reference for a metric in [0, 1] is its worst value."""
        return self._hypervolume.full


@dataclass(frozen=True)
class _Hypervolume:
    """Of the networks in the region that matters, and of all."""

    within: float = 0.0
    full: float = 0.0

    @property
    def progress(self) -> tuple[float, float]:
        """What rises with each gain: what is gained outside the region is one only while nothing is
        in it."""
        if self.within:
            return self.within, 0.0
        return 0.0, self.full


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended, or was cut off."""

    search: str
    ledger: Ledger
    front: list[MeasuredNetwork]
    wall_seconds: float
    tracking_uri: str
    interrupted: bool
    run_ids: dict[str, str] = field(default_factory=dict)
    """MLflow run ids by the trials' labels."""
    undelivered: bool = False
    """Whether the tracking store does not have everything yet."""

    @property
    def all_failed(self) -> bool:
        """Whether no trial completed or was stopped early, though none was cut off: the exit code
        of the command is then 1."""
        if self.interrupted:
            return False
        return all(trial.status == "failed" for trial in self.ledger.trials)
