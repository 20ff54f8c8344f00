"""How much worse than the baseline a network may be: a tolerance to be as good as it, five to
matter."""

import math
from collections.abc import Mapping
from typing import Any

from slimfront.search.config.objectives import Objective
from slimfront.search.record.trials import MeasuredNetwork, TrialRecord

REGION = 5
"""So many tolerances below the baseline's quality ends the region that matters."""


class Region:
    """The networks near the quality of a baseline.

    A network is about as good as the baseline if it is worse by at most a tolerance (see
    `Objective.near`), and in the region that matters, where somebody may ship it, if it is worse by
    at most five. Nothing is near a baseline that was not measured yet.
    """

    def __init__(self, quality: Objective, tolerance: float) -> None:
        self.quality = quality
        self.tolerance = tolerance
        self.baseline: TrialRecord | None = None
        """The training of the dense network."""

    @property
    def dense_network(self) -> MeasuredNetwork | None:
        """The last network that the baseline was measured as; None if there is none yet."""
        if self.baseline is None:
            return None
        return self.baseline.last

    def is_near(self, point: MeasuredNetwork) -> bool:
        """Whether a network is about as good as the baseline: worse by at most a tolerance."""
        return self._is_within(point, 1)

    def holds(self, point: MeasuredNetwork) -> bool:
        """Whether a network is worse than the baseline by at most five tolerances."""
        return self._is_within(point, REGION)

    def _is_within(self, point: MeasuredNetwork, tolerances: int) -> bool:
        bound = self.quality_within(tolerances)
        quality = point.mean(self.quality.name)
        return self.quality.as_good(quality, bound)

    def quality_within(self, tolerances: int) -> float:
        """The quality that is worse than the baseline's by so many tolerances; NaN before that was
        measured."""
        baseline = self.dense_network
        if baseline is None:
            return math.nan
        value = baseline.mean(self.quality.name)
        return self.end(value, tolerances)

    def end(self, value: float, tolerances: int = REGION) -> float:
        """The quality that is worse than `value` by so many tolerances."""
        share = tolerances * self.tolerance
        return self.quality.near(value, share)

    def missed_by(self, epoch: int, measures: Mapping[str, Any]) -> float:
        """By how much a network with these measures, after so many epochs, misses the region around
        the baseline's own quality at that epoch, in the metric's unit; 0 or less is inside, and 0
        where the baseline was not measured then, +inf without a quality."""
        name = self.quality.name
        quality = float(measures.get(name, math.nan))
        if math.isnan(quality):
            return math.inf
        baseline = self._baseline_at(epoch)
        if baseline is None:
            return 0.0
        end = self.end(baseline)
        least = self.quality.goodness(end)
        reached = self.quality.goodness(quality)
        return least - reached

    def _baseline_at(self, epoch: int) -> float | None:
        """The baseline's quality after so many epochs; None if it was not measured then."""
        if self.baseline is None:
            return None
        for point in self.baseline.points:
            if point.epoch != epoch:
                continue
            quality = point.measures[self.quality.name]
            if math.isfinite(quality):
                return quality
        return None

    def text(self, tolerances: int = REGION) -> str:
        """How far so many tolerances reach below the baseline's quality, as people read it."""
        share = tolerances * self.tolerance
        return self.quality.tolerance_text(share)
