"""Objectives: their names, directions and scales. The one place where a sign is flipped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from search.pareto import Points
from trainables.measures import MEASURES


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

        An accuracy a becomes 1 − a. A size v becomes log(1 + v) / log(1 + dense), so that each halving counts alike,
        and a network as large as the dense one is at the reference.
        """
        if self.direction is Direction.MAXIMIZE:
            return 1 - value
        return math.log1p(value) / math.log1p(max(dense, 1.0))


OBJECTIVES = {"val_accuracy": Objective("val_accuracy", Direction.MAXIMIZE)} | {
    name: Objective(name, Direction.MINIMIZE) for name in MEASURES
}
"""What a config may name under `objectives`."""


def losses(measures: Sequence[Mapping[str, float]], objectives: Sequence[Objective], dense: Mapping[str, float]) -> Points:
    """(N, M) losses of N trials' measures; `dense` holds the dense network's sizes. A missing measure becomes NaN."""
    rows = [[o.loss(m.get(o.name, math.nan), dense.get(o.name, math.nan)) for o in objectives] for m in measures]
    return np.array(rows, dtype=np.float64).reshape(len(measures), len(objectives))
