"""When masks change, and by how much."""

import math
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers.base import TargetSparsifier


def cubic_sparsity(progress: float, target: float, initial: float = 0.0) -> float:
    """Zhu, Gupta 2017, arXiv 1710.01878, eq. 1: from `initial` to `target` on a cubic; `progress`
    is clipped to [0, 1]."""
    left = 1 - _clipped(progress)
    cubic = left**3
    difference = initial - target
    return target + difference * cubic


def cosine_decay(progress: float, initial: float) -> float:
    """Evci et al. 2020, arXiv 1911.11134, section 3: initial / 2 · (1 + cos(π · progress));
    `progress` is clipped to [0, 1]."""
    angle = math.pi * _clipped(progress)
    raised = 1 + math.cos(angle)
    half = initial / 2
    return half * raised


def _clipped(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


class Scheduled(TargetSparsifier):
    """Masks that are updated every `every` steps between `start` and `end`, fractions of
    training."""

    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(0.75, ge=0, le=1)
    every: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start ({self.start}) is after end ({self.end})")
        return self


@dataclass(frozen=True)
class Times:
    """When masks are updated: every `every` steps between `start` and `end`, fractions of
    training."""

    start: float
    end: float
    every: int


class Updates:
    """The steps of one training at which masks are updated: the first, every n-th from there, and
    the last."""

    def __init__(self, options: Scheduled | Times, total_steps: int) -> None:
        # The last update happens at `end`, or in the last step if that comes first: the target is
        # always met.
        last_step = total_steps - 1
        end = int(options.end * total_steps)
        self.last = max(min(end, last_step), 0)
        start = int(options.start * total_steps)
        self.first = min(start, self.last)
        self.every = options.every

    def due(self, step: int) -> bool:
        """Whether there is an update after `step`."""
        if not self.first <= step <= self.last:
            return False
        if step == self.last:
            return True
        since_first = step - self.first
        return since_first % self.every == 0

    def progress(self, step: int) -> float:
        """0 at the first update, 1 at the last."""
        if step >= self.last:
            return 1.0
        since_first = step - self.first
        return since_first / (self.last - self.first)

    def check_several(self, name: str) -> None:
        """Raises UserError if masks that should move would be updated only at the last step."""
        between = self.last - self.first
        if between < self.every:
            raise UserError(
                f"sparsifier.every ({self.every}) is longer than the {between} "
                "steps between start and end of "
                f"'{name}', so that its masks would hardly move; set it lower, or train longer"
            )
