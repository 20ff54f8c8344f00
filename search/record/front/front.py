"""The networks that no other one of a search is better than, as they are measured one by one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective, first_size, losses
from slimfront.search.record.front.pareto import Points, hypervolume, knee
from slimfront.search.record.front.region import Region
from slimfront.search.record.front.ties import fastest
from slimfront.search.record.trials import MeasuredNetwork, Measures, TrialRecord
from slimfront.trainables.measures.latency import SPEEDS
from slimfront.trainables.measures.measure import MEASURES

_ARCHITECTURE = ("params", "layers", "flops", "bytes", "peak_activation_bytes")
"""Networks that agree in these run the same kernels on as much."""

_MARGIN = 0.1
"""How much farther out than the hypervolume's the reference is by which gains are seen."""
_TIMED_AT_MOST = 5
"""So many of the fastest networks are timed again when a search is over."""

Architecture = tuple[float | None, ...]
"""The values of those of a network."""


class Front:
    """The non-dominated networks that meet the constraints, and their hypervolume.

    It is taken over every network that was measured, of whatever trial: one that was stopped early,
    or failed later, may have passed through a good one.

    `dense_sizes` scale the losses (see `Objective.loss`): the measures and metrics of the dense
    network, of which those of the trained one replace those of the untrained one.

    Networks of one architecture are equally fast, however their times came out: as fast as the
    first of them. With `zeros_save_time` that holds only for as many non-zero weights.
    """

    def __init__(
        self,
        objectives: list[Objective],
        dense_sizes: Measures,
        constraints: Iterable[Constraint],
        region: Region,
        *,
        zeros_save_time: bool = False,
    ) -> None:
        self.objectives = objectives
        self.dense_sizes = dict(dense_sizes)
        self.constraints = list(constraints)
        self.region = region
        self.quality = region.quality
        self._architecture = list(_ARCHITECTURE)
        if zeros_save_time:
            self._architecture.append("nonzero_params")
        self._times: dict[Architecture, Measures] = {}
        """Those of the first network of each architecture that joined."""
        self._members: list[MeasuredNetwork] = []
        self._losses: Points = np.empty((0, len(objectives)))
        """Those of the members, (members, objectives)."""
        self._reference = np.ones(len(objectives))
        """The losses at which the region that matters ends, (objectives,)."""
        self._hypervolume = _Hypervolume()

    def members(self) -> list[MeasuredNetwork]:
        """All of them, best first."""
        order = self._order()
        return [self._members[place] for place in order]

    def _order(self) -> list[int]:
        """The places of the members in `_members`, best first; one without a quality is last."""

        count = len(self._members)
        return sorted(range(count), key=self._rank)

    def _rank(self, place: int) -> tuple[float, float, int]:
        """Less is better."""
        point = self._members[place]
        quality = point.measures[self.quality.name]
        badness = -self.quality.goodness(quality)
        if math.isnan(badness):
            badness = math.inf
        size = point.measures["nonzero_params"]
        number = point.trial.number or 0
        return badness, size, number

    def take_in(self, *points: MeasuredNetwork) -> None:
        """Has networks join the front that are not dominated; what they dominate leaves it."""
        changed = False
        for point in points:
            if self._joins(point):
                changed = True
        if changed:
            self._hypervolume = self._computed_hypervolume()

    def _joins(self, point: MeasuredNetwork) -> bool:
        loss = self._loss_of_member(point.trial, point.measures)
        if loss is None:
            return False
        measures = point.measures
        architecture = self._architecture_of(measures)
        self._times.setdefault(architecture, _times(measures))
        no_better = loss <= self._losses
        worse = loss < self._losses
        dominated = no_better.all(axis=1) & worse.any(axis=1)
        stay = np.flatnonzero(~dominated)
        staying = [self._members[member] for member in stay]
        their_losses = self._losses[stay]
        self._members = [*staying, point]
        self._losses = np.vstack([their_losses, loss])
        return True

    def would_join(self, record: TrialRecord, measures: Measures) -> bool:
        """Whether a network of the trial with these measures would join the front; one that would
        not now never will."""
        if record.number is None:
            return False
        loss = self._loss_of_member(record, measures)
        return loss is not None

    def _loss_of_member(self, record: TrialRecord, measures: Measures) -> Points | None:
        """The losses of a network that meets the constraints, and is not dominated or as good as an
        earlier one of its trial."""
        loss: Points = self._losses_of([measures])[0]
        if not np.isfinite(loss).all():
            return None
        for constraint in self.constraints:
            if not constraint.met_by(measures):
                return None
        no_worse = (self._losses <= loss).all(axis=1)
        for member in np.flatnonzero(no_worse):
            dominates = (self._losses[member] < loss).any()
            if dominates:
                return None
            equally_good = self._members[member]
            if equally_good.trial is record:
                return None
        return loss

    def told_to_trials(self) -> list[dict[str, float]]:
        """What is judged of each member, by objective, where that is one quality, and sizes that
        are known before a network is evaluated; else nothing."""
        names = {objective.name for objective in self.objectives}
        sizes = names - {self.quality.name}
        if sizes == names or not sizes <= set(MEASURES):
            return []
        return [{name: point.measures[name] for name in names} for point in self._members]

    def _losses_of(self, measured: list[Measures]) -> Points:
        """The losses of networks, (networks, objectives), with the times of their architectures."""
        tied = []
        for measures in measured:
            architecture = self._architecture_of(measures)
            known = self._times.get(architecture, {})
            tied.append(measures | known)
        return losses(tied, self.objectives, self.dense_sizes)

    def _architecture_of(self, measures: Measures) -> Architecture:
        values = [measures.get(name) for name in self._architecture]
        return tuple(values)

    def scale_by(self, dense: Measures) -> None:
        """Takes in the measures of the trained dense network: the region ends at five tolerances
        below its quality, and sizes, times and metrics that are no shares count relative to its
        own. Who is on the front is not changed by it, and the hypervolume is."""
        for objective in self.objectives:
            value = dense.get(objective.name, math.nan)
            is_unit = value > 0 or objective.measure.quality
            if math.isfinite(value) and is_unit:
                self.dense_sizes[objective.name] = value
        self._reference = self._end_of_region(dense)
        measures = [point.measures for point in self._members]
        self._losses = self._losses_of(measures)
        self._hypervolume = self._computed_hypervolume()

    def _end_of_region(self, dense: Measures) -> Points:
        """The losses at which the region ends, (objectives,): those of a network as large as the
        dense one, and worse than it by five tolerances; as before where its quality is no
        number."""
        quality = self.quality.name
        value = dense.get(quality, math.nan)
        if not math.isfinite(value):
            return self._reference
        ends = np.ones(len(self.objectives))
        worst = self.region.end(value)
        for index, objective in enumerate(self.objectives):
            if objective.name != quality:
                continue
            loss = objective.loss(worst, value)
            ends[index] = min(1.0, loss)
        return ends

    def _computed_hypervolume(self) -> "_Hypervolume":
        worst = np.ones(len(self.objectives))
        full = hypervolume(self._losses, worst)
        largest = float(self._reference.prod())
        if largest == 1.0:
            return _Hypervolume(full, full)
        if not largest:
            return _Hypervolume(0.0, full)
        in_region = hypervolume(self._losses, self._reference)
        return _Hypervolume(in_region / largest, full)

    def hypervolume(self) -> float:
        """The front's hypervolume within the region that matters, from 0 (nothing there is smaller
        than dense) to 1: the losses (see `Objective.loss`) are taken relative to their reference,
        which is at the dense network's sizes and at five tolerances below its quality. That of the
        whole front while the baseline's quality is not known."""
        return self._hypervolume.within

    def hypervolume_full(self) -> float:
        """That of the whole front, whose reference for a metric in [0, 1] is its worst value."""
        return self._hypervolume.full

    @property
    def progress(self) -> tuple[float, float]:
        """What rises with each gain: what is gained outside the region is one only while nothing is
        in it. Hypervolumes whose reference lies farther out: what is as large as the dense network
        by one objective has none else, whatever it gains by the others."""
        farther = 1 + _MARGIN
        within = hypervolume(self._losses, farther * self._reference)
        if within:
            return within, 0.0
        everywhere = np.full(len(self.objectives), farther)
        return 0.0, hypervolume(self._losses, everywhere)

    def knee(self) -> MeasuredNetwork | None:
        """The member below which quality falls fastest (see `pareto.knee`), of those in the region
        that matters, or of all where none is in it; None without a front."""
        order = self._order()
        if not order:
            return None
        inside = []
        for index in order:
            if self.region.holds(self._members[index]):
                inside.append(index)
        looked_at = inside or order
        place = knee(self._losses[looked_at])
        return self._members[looked_at[place]]

    def recommended(self) -> MeasuredNetwork | None:
        """The smallest member, by the first objective that is no metric, that is about as good as
        the baseline; where there is none, the best there is. Judged by the means of replicas where
        there are any. None without a front."""
        members = self.members()
        if not members:
            return None
        near = [point for point in members if self.region.is_near(point)]
        if not near:
            return max(members, key=self._mean_goodness)
        size = first_size(self.objectives)
        if size.name in SPEEDS:
            near = fastest(near, size)
            size = OBJECTIVES["nonzero_params"]
        # Of several of one size, the best: it comes first.
        return max(near, key=lambda point: size.goodness(point.measures[size.name]))

    def to_be_timed(self) -> list[MeasuredNetwork]:
        """What is timed again when a search is over: what is recommended; where that is so because
        it is fast, also the fastest others that it might have been, one of each architecture."""
        point = self.recommended()
        if point is None:
            return []
        size = first_size(self.objectives)
        if size.name not in SPEEDS or not self.region.is_near(point):
            return [point]
        by_architecture: dict[Architecture, MeasuredNetwork] = {}
        for member in self.members():
            if self.region.is_near(member):
                architecture = self._architecture_of(member.measures)
                by_architecture.setdefault(architecture, member)
        chosen = list(by_architecture.values())
        chosen.sort(key=lambda member: size.goodness(member.measures[size.name]), reverse=True)
        return chosen[:_TIMED_AT_MOST]

    def _mean_goodness(self, point: MeasuredNetwork) -> float:
        mean = point.mean(self.quality.name)
        return self.quality.goodness(mean)


def _times(measures: Measures) -> Measures:
    taken = {}
    for name in SPEEDS:
        if name in measures:
            taken[name] = measures[name]
    return taken


@dataclass(frozen=True)
class _Hypervolume:
    """Of the networks in the region that matters, and of all."""

    within: float = 0.0
    full: float = 0.0
