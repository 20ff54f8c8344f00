"""Objectives: their names, directions and scales. The one place where a sign is flipped."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from slimfront.trainables.measures.measure import EXTRA_MEASURES, MEASURES
from slimfront.trainables.options import suggest


class Direction(Enum):
    """Whether more or less of an objective is better; the values are Optuna's names."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True)
class Objective:
    """A measure or accuracy that the search minimises or maximises."""

    name: str
    direction: Direction

    def loss(self, value: float, dense: float) -> float:
        """The value on a scale for hypervolumes, where less is better and 1 is the reference point.

        An accuracy a becomes 1 − a. A size v becomes log(1 + v) / log(1 + dense), so that each
        halving counts alike, and a network as large as the dense one is at the reference. A time
        becomes its ratio to the dense network's.
        """
        if self.name == "speedup":
            return 1 / value if value > 0 else math.inf
        if self.name == "latency_ms":
            return value / dense
        if self.direction is Direction.MAXIMIZE:
            return 1 - value
        return math.log1p(value) / math.log1p(max(dense, 1.0))


OBJECTIVES = {
    name: Objective(
        name, Direction.MAXIMIZE if name in ("val_accuracy", "speedup") else Direction.MINIMIZE
    )
    for name in ("val_accuracy", *MEASURES, *EXTRA_MEASURES)
}
"""What a config may name under `objectives`."""


def losses(
    measures: Sequence[Mapping[str, float]],
    objectives: Sequence[Objective],
    dense: Mapping[str, float],
) -> NDArray[np.float64]:
    """(N, M) losses of N trials' measures; `dense` holds the dense network's sizes. A missing
    measure becomes NaN."""
    rows = [
        [o.loss(m.get(o.name, math.nan), dense.get(o.name, math.nan)) for o in objectives]
        for m in measures
    ]
    return np.array(rows, dtype=np.float64).reshape(len(measures), len(objectives))


@dataclass(frozen=True)
class Constraint:
    """A bound that a network must keep to be on the front, such as val_accuracy >= 0.9."""

    name: str
    at_least: bool
    bound: float

    @classmethod
    def parse(cls, name: str, text: object) -> "Constraint":
        """From `">= 0.9"` or `"<= 3"`. Raises ValueError with one sentence if it is neither."""
        match = re.fullmatch(r"\s*(>=|<=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*", str(text))
        if name not in OBJECTIVES:
            raise ValueError(f"'{name}' is not a measure; {suggest(name, OBJECTIVES)}")
        if match is None:
            raise ValueError(
                f'the constraint on {name} is {text!r}; it needs the form ">= 0.9" or "<= 3"'
            )
        return cls(name, match[1] == ">=", float(match[2]))

    def violation(self, measures: Mapping[str, float]) -> float:
        """How far beyond the bound, in the measure's unit; 0 or less is kept, +inf if it was not
        measured."""
        value = measures.get(self.name, math.nan)
        violation = self.bound - value if self.at_least else value - self.bound
        return math.inf if math.isnan(violation) else violation

    def met_by(self, measures: Mapping[str, float]) -> bool:
        """Whether the bound is kept."""
        return self.violation(measures) <= 0
