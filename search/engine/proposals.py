"""What the study proposes, and which of it was given out already: no values are trained twice."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from slimfront.search.config.search_space import SearchSpace
from slimfront.search.record.study import suggest

_MOST_COMBINATIONS = 10_000
"""A space with more of them is not counted: no search trains so many."""


Distributions = Mapping[str, BaseDistribution]
Values = dict[str, Any]
"""The values of a trial by path, as it records them."""


class Proposals:
    """The values of a space that trials are given, each of them once.

    Args:
        space: what depends on what.
        distributions: of the paths that the study is asked for.
    """

    def __init__(self, space: SearchSpace, distributions: Distributions) -> None:
        self.space = space
        self.distributions = distributions
        self.first: dict[str, int] = {}
        """By values, as a key: the trial that was given them."""
        options = {}
        for path, distribution in distributions.items():
            options[path] = _all_of(distribution)
        combinations = space.combinations(options, _MOST_COMBINATIONS)
        self.left: dict[str, Values] | None = None
        """The values that no trial was given yet, by their keys; None if they are too many."""
        self.size = 0
        if combinations is not None:
            self.left = {_key(values): values for values in combinations}
            self.size = len(self.left)

    @property
    def exhausted(self) -> bool:
        """Whether every candidate that there is was given out."""
        return self.left is not None and not self.left

    def suggested(self, trial: optuna.Trial) -> Values:
        """The values of a trial of the study: those that it has, and others drawn now."""

        def draw(path: str) -> Any:
            distribution = self.distributions[path]
            return suggest(trial, path, distribution)

        return self.space.values(draw)

    def give(self, number: int, values: Mapping[str, Any]) -> int:
        """Notes that a trial has these values; the number of the first trial that has them."""
        key = _key(values)
        if self.left is not None:
            self.left.pop(key, None)
        return self.first.setdefault(key, number)

    def untried(self, seed: int) -> Values | None:
        """What to enqueue for a trial with values that none was given yet; None if it is not known
        which they are."""
        if not self.left:
            return None
        choices = list(self.left.values())
        values = Random(seed).choice(choices)  # noqa: S311 (nothing secret)
        asked = {}
        for path, value in values.items():
            if path in self.distributions:
                asked[path] = value
        return asked


def _all_of(distribution: BaseDistribution) -> Sequence[Any] | None:
    """All values of a distribution; None if they are without number."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        after_last = distribution.high + 1
        return range(distribution.low, after_last, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    low = distribution.low
    high = distribution.high
    step = distribution.step
    if distribution.single():
        return (low,)
    if step is None:
        return None
    span = high - low
    last = round(span / step)
    if last >= _MOST_COMBINATIONS:
        return None
    numbers = range(last + 1)
    return [low + number * step for number in numbers]


def _key(values: Mapping[str, Any]) -> str:
    """Values as a text that is the same for the same values; steps of a range may differ in their
    last digits."""
    lines = []
    for path in sorted(values):
        value = values[path]
        text = repr(value)
        is_truth = isinstance(value, bool)
        if isinstance(value, int | float) and not is_truth:
            text = f"{value:.12g}"
        lines.append(f"{path}={text}")
    return "\n".join(lines)
