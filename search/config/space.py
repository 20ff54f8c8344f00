"""What may vary: parameters by dotted path, and their translation to Optuna's distributions."""

import math
from collections.abc import Mapping
from random import Random
from typing import Any, Self

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import model_validator

from slimfront.trainables.errors import shorten
from slimfront.trainables.options import Options

Scalar = bool | int | float | str

_MOST_STEPS = 1_000_000_000
"""A range with more steps is as good as one without; Optuna's arithmetic of steps breaks far
beyond."""


class Parameter(Options):
    """One value that varies: a range `low` … `high` (both included), optionally `log` or in steps
    of `step`; or `choices`."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: tuple[Scalar | None, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices is not None:
            self._refuse_choices(self.choices)
        elif self.low is None or self.high is None:
            raise ValueError("it needs 'low' and 'high', or 'choices'")
        else:
            self._refuse_range(self.low, self.high)
        return self

    def _refuse_choices(self, choices: tuple[Scalar | None, ...]) -> None:
        if not choices:
            raise ValueError("'choices' is empty; it needs at least one value")
        if self.low is not None or self.high is not None or self.log or self.step is not None:
            raise ValueError("'choices' does not go together with 'low', 'high', 'log' or 'step'")

    def _refuse_range(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"low ({low}) is greater than high ({high})")
        if self.log and low <= 0:
            raise ValueError(f"with log: true, low must be above 0, and it is {low}")
        if self.step is None:
            return
        if self.log:
            raise ValueError("'log' and 'step' do not go together")
        if self.step <= 0:
            raise ValueError(f"step must be above 0, and it is {self.step}")
        steps = (high - low) / self.step
        if steps > _MOST_STEPS:
            raise ValueError(
                f"step ({self.step}) is too small: the range has more than {_MOST_STEPS:,} of "
                "them; leave it out"
            )
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"steps of {self.step} from low ({low}) do not end at high ({high})")

    def ends(self) -> tuple[Scalar | None, ...]:
        """The values to check against the config's schema: both ends of a range, or all choices."""
        if self.choices is not None:
            return self.choices
        return (self.low, self.high)

    def draw(self, random: Random, *, integer: bool) -> Scalar | None:
        """A value from anywhere in the parameter, for checking."""
        if self.choices is not None:
            return random.choice(self.choices)
        # _consistent checked.
        assert self.low is not None and self.high is not None
        if self.log:
            exponent = random.uniform(math.log(self.low), math.log(self.high))
            value = math.exp(exponent)
            if integer:
                return round(value)
            return min(max(value, self.low), self.high)
        if not integer and self.step is None:
            return random.uniform(self.low, self.high)
        step = self.step or 1
        most = int((self.high - self.low) / step + 1e-9)
        value = self.low + step * random.randint(0, most)
        if integer:
            return int(value)
        return value

    def distribution(self, *, integer: bool) -> BaseDistribution:
        """Optuna's distribution; `integer` says that the value lands in an integer field."""
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        # _consistent checked.
        assert self.low is not None and self.high is not None
        if integer:
            return IntDistribution(
                int(self.low), int(self.high), log=self.log, step=int(self.step or 1)
            )
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)


def set_path(tree: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of nested mappings with `value` at a dotted path; missing or empty levels are made on
    the way.

    Raises:
        KeyError: if the path leads through something that is not a mapping.
    """
    head, _, rest = path.partition(".")
    copy = dict(tree)
    if not rest:
        copy[head] = value
        return copy
    below = copy.get(head)
    if below is not None and not isinstance(below, Mapping):
        shown = shorten(repr(below))
        raise KeyError(f"'{head}' is {shown}, which has no '{rest}'")
    copy[head] = set_path(below or {}, rest, value)
    return copy


def set_paths(tree: Mapping[str, Any], values: Mapping[str, object]) -> dict[str, Any]:
    """`set_path` for several paths."""
    result = dict(tree)
    for path, value in values.items():
        result = set_path(result, path, value)
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keyed by dotted path; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
