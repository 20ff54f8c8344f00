"""What is known about a search, as its journal tells it: its trials, and the front of the networks
that they passed through."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective
from slimfront.search.record.events import (
    CheckpointMoved,
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworkReplicated,
    NetworksPruned,
    NetworkTested,
    NetworkTimed,
    OfTrial,
    ProposalRepeated,
    SearchBegan,
    TrialBegan,
    TrialContinued,
    TrialEnded,
    TrialInterrupted,
)
from slimfront.search.record.front.front import Front
from slimfront.search.record.front.region import Region
from slimfront.search.record.storage import join
from slimfront.search.record.trials import MeasuredNetwork, Status, TrialRecord, label

if TYPE_CHECKING:
    from slimfront.search.config.schema import Config

_SEEDS = 2**32
"""Replicas of seeds from here on are of versions of which they drew what trials had drawn: torch
takes a seed modulo 2³²."""


class Ledger:
    """The trials of one search, the front of their networks, and the region of it that matters.

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
        *,
        zeros_save_time: bool = False,
    ) -> None:
        """`quality` is the first metric of the task; if None, the first among the objectives, or
        that of classification. `dense_sizes` and `zeros_save_time` are as for `Front`, `tolerance`
        as for `Region`."""
        metrics = [objective for objective in objectives if objective.measure.quality]
        self.objectives = objectives
        self.quality = quality or next(iter([*metrics, *OBJECTIVES.values()]))
        self.region = Region(self.quality, tolerance)
        self.front = Front(
            objectives, dense_sizes, constraints, self.region, zeros_save_time=zeros_save_time
        )
        self.place = place
        self.planned = 0
        """How many trials there are to be."""
        self.trials: list[TrialRecord] = []
        self.counts: Counter[Status] = Counter()
        """How many of them have each status: asked at every event, when they may be thousands."""
        self.by_label: dict[str, TrialRecord] = {}
        self.repeated: dict[int, ProposalRepeated] = {}
        """Proposals that were not trained, since an earlier trial has their values, by number."""
        self._gained = self.front.progress
        self.since_gain = 0
        """How many trials have ended since the hypervolume last rose."""

    @property
    def dense(self) -> TrialRecord | None:
        """The training of the dense network; None before it began."""
        return self.region.baseline

    @property
    def dense_network(self) -> MeasuredNetwork | None:
        """The last network that it was measured as; None if there is none yet."""
        return self.region.dense_network

    @property
    def dense_sizes(self) -> dict[str, float]:
        """What scales the losses; see `Front`."""
        return self.front.dense_sizes

    @property
    def constraints(self) -> list[Constraint]:
        """What networks of the front keep."""
        return self.front.constraints

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
            case NetworksPruned():
                point = self.find(record, event.epoch)
                _add_pruned(point, event.pruned)
                self.front.take_in(*point.pruned)
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
                if event.seed < _SEEDS:
                    network.replicas[event.seed] = event.measures
            case NetworkTimed():
                network = self.find(record, event.epoch, event.step)
                network.timed_again = event.times
                network.each_time = event.each

    def _end(self, record: TrialRecord, event: TrialEnded) -> None:
        self._becomes(record, event.status, event.reason)
        if record.number is None:
            return
        progress = self.front.progress
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
            self.region.baseline = record
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
        _add_pruned(point, event.pruned)
        record.points.append(point)
        if record.number is None:
            self.front.scale_by(point.measures)
            self._gained = min(self._gained, self.front.progress)
        else:
            self.front.take_in(point, *point.pruned)

    def with_status(self, status: Status) -> list[TrialRecord]:
        """The trials of that status; the dense reference is not among them."""
        return [trial for trial in self.trials if trial.status == status]


def _add_pruned(point: MeasuredNetwork, found: Iterable[Mapping[str, Any]]) -> None:
    """Adds the networks that a network was pruned to in one shot, which are kept where it is."""
    for place, pruned in enumerate(found, start=1):
        further = MeasuredNetwork(
            point.trial,
            point.epoch,
            pruned["measures"],
            [*point.compaction, *pruned["compaction"]],
            checkpoint=None,
            step=pruned.get("step") or place,  # an older journal does not say it
            source=point,
        )
        point.pruned.append(further)


def ledger_of(config: "Config", begun: SearchBegan, place: str) -> Ledger:
    """The empty ledger of a search that began so, in the folder `place`."""
    return Ledger(
        objectives=config.chosen_objectives(),
        dense_sizes=begun.dense_sizes,
        constraints=config.chosen_constraints(),
        place=place,
        quality=config.quality(),
        tolerance=config.tolerance,
        # A runtime of the user's own may skip zeros; those that are built in do not.
        zeros_save_time=config.latency.command is not None,
    )


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
