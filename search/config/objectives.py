"""Objectives: their names, directions and scales. The one place where a sign is flipped."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfront.trainables.measures.described import KNOWN, Measure, of_metrics
from slimfront.trainables.options import suggest
from slimfront.trainables.tasks import Classification, Task

_BOUND = re.compile(r"\s*(>=|<=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


class Direction(Enum):
    """Whether more or less of an objective is better; the values are Optuna's names."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True)
class Objective:
    """A metric or measure that the search minimises or maximises."""

    measure: Measure

    @property
    def name(self) -> str:
        """Its name in a config."""
        return self.measure.name

    @property
    def direction(self) -> Direction:
        """Whether more or less of it is better."""
        if self.measure.better == "larger":
            return Direction.MAXIMIZE
        return Direction.MINIMIZE

    def loss(self, value: float, dense: float) -> float:
        """The value on a scale for hypervolumes, where less is better and 1 is the reference point.

        A metric q in [0, 1] becomes 1 − q, or q where less is better. Any other metric becomes
        (1 + d) / 2, where d is how much worse it is than the dense network's, relative to that: an
        error twice as large is at the reference, and half of the way there is as good as dense. A
        size v becomes log(1 + v) / log(1 + dense), so that each halving counts alike, and a network
        as large as the dense one is at the reference. A time becomes its ratio to the dense
        network's, and a speed-up its inverse; so does what is logarithmic or a ratio, and better
        when larger. Sizes, times and ratios are never negative: measures of the user's are held to
        that when they are taken (`OwnMeasure.take`).
        """
        larger = self.measure.better == "larger"
        match self.measure.scale:
            case "share":
                if larger:
                    return 1 - value
                return value
            case "relative":
                # A metric may have no value for a network that is not trained yet.
                base = dense if math.isfinite(dense) else 0.0
                worse = base - value if larger else value - base
                unit = abs(base) or 1.0
                return (1 + worse / unit) / 2
            case "inverse":
                return _inverse(value)
            case "ratio":
                share = _ratio(value, dense)
            case _:
                share = _ratio(_logarithm(value), _logarithm(dense))
        if larger:
            return _inverse(share)
        return share

    def as_good(self, value: float, bound: float) -> bool:
        """Whether a value is at least as good as another."""
        larger = self.direction is Direction.MAXIMIZE
        if larger:
            return value >= bound
        return value <= bound

    def goodness(self, value: float) -> float:
        """The value with the sign at which more is better."""
        if self.direction is Direction.MAXIMIZE:
            return value
        return -value

    def near(self, value: float, share: float) -> float:
        """What is as good as `value` but for a tolerance: `share`, of the value where the metric is
        not in [0, 1]."""
        tolerance = share
        if self.measure.scale != "share":
            tolerance = share * abs(value)
        if self.direction is Direction.MAXIMIZE:
            return value - tolerance
        return value + tolerance

    def tolerance_text(self, share: float) -> str:
        """A tolerance as people read it: as it is for a metric in [0, 1], else in per cent."""
        if self.measure.scale == "share":
            return f"{share:.3g}"
        return f"{100 * share:.3g} %"

    def as_plain(self) -> dict[str, str | bool]:
        """All of it as plain data, which `from_plain` reads."""
        return asdict(self.measure)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Objective":
        """What `as_plain` made."""
        known = {}
        for field in fields(Measure):
            if field.name in plain:
                known[field.name] = plain[field.name]
        return cls(Measure(**known))


def _logarithm(size: float) -> float:
    return math.log1p(max(size, 0.0))


def _inverse(share: float) -> float:
    if share > 0:
        return 1 / share
    return math.inf


def _ratio(value: float, dense: float) -> float:
    if dense:
        return value / dense
    if value:
        return math.inf
    return 1.0


def known_objectives(task: Task, own: Mapping[str, Measure] | None = None) -> dict[str, Objective]:
    """What a config may name under `objectives`: the metrics of its task on the validation split,
    the measures of every network, and the user's own."""
    measures = of_metrics(task.described())
    measures |= KNOWN
    if own:
        measures |= own
    found = {}
    for name, measure in measures.items():
        found[name] = Objective(measure)
    return found


OBJECTIVES = known_objectives(Classification())
"""Those of a config that names no task."""


def first_size(objectives: Iterable[Objective]) -> Objective:
    """What small means: the first objective that is no metric, or non-zero parameters."""
    for objective in objectives:
        if not objective.measure.quality:
            return objective
    return OBJECTIVES["nonzero_params"]


def losses(
    measures: Sequence[Mapping[str, float]],
    objectives: Sequence[Objective],
    dense: Mapping[str, float],
) -> NDArray[np.float64]:
    """(N, M) losses of N trials' measures; `dense` holds those of the dense network. A missing
    measure of a trial becomes NaN."""
    rows = []
    for measured in measures:
        row = []
        for objective in objectives:
            name = objective.name
            value = measured.get(name, math.nan)
            row.append(objective.loss(value, dense.get(name, math.nan)))
        rows.append(row)
    shape = (len(measures), len(objectives))
    return np.array(rows, dtype=np.float64).reshape(shape)


@dataclass(frozen=True)
class Constraint:
    """A bound that a network must keep to be on the front, such as val_f1 >= 0.9."""

    name: str
    at_least: bool
    bound: float
    head: str = ""
    """What tables call the measure, where that is not its name."""

    @classmethod
    def parse(
        cls, name: str, text: object, known: Mapping[str, Objective] = OBJECTIVES
    ) -> "Constraint":
        """From `">= 0.9"` or `"<= 3"`. Raises ValueError with one sentence if it is neither, or if
        `name` is not among the `known`."""
        if name not in known:
            raise ValueError(f"'{name}' is not a measure; {suggest(name, known)}")
        match = _BOUND.fullmatch(str(text))
        if match is None:
            raise ValueError(
                f'the constraint on {name} is {text!r}; it needs the form ">= 0.9" or "<= 3"'
            )
        sign, bound = match.groups()
        measure = known[name].measure
        head = "" if measure.quality else measure.short
        return cls(name, sign == ">=", float(bound), head)

    def violation(self, measures: Mapping[str, float]) -> float:
        """How far beyond the bound, in the measure's unit; 0 or less is kept, +inf if it was not
        measured."""
        value = measures.get(self.name, math.nan)
        if math.isnan(value):
            return math.inf
        if self.at_least:
            return self.bound - value
        return value - self.bound

    def met_by(self, measures: Mapping[str, float]) -> bool:
        """Whether the bound is kept."""
        return self.violation(measures) <= 0
