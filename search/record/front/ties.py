"""Networks that are equally fast, as far as their times can tell."""

import math
import statistics
from collections.abc import Sequence

from slimfront.search.config.objectives import Objective
from slimfront.search.record.trials import MeasuredNetwork

_ERRORS = 2.0
"""Two times are one that differ by no more than so many standard errors of their difference."""


def fastest(points: Sequence[MeasuredNetwork], speed: Objective) -> list[MeasuredNetwork]:
    """The fastest of some networks and those whose times are no worse but for noise, in the order
    given: by the times that were taken in quiet, and of those networks alone, where there are any;
    else the fastest by its time while trials ran beside it."""
    timed = [point for point in points if speed.name in (point.timed_again or {})]
    if not timed:
        return [max(points, key=lambda point: speed.goodness(point.measures[speed.name]))]

    def of(point: MeasuredNetwork) -> float:
        return (point.timed_again or {})[speed.name]

    best = max(timed, key=lambda point: speed.goodness(of(point)))
    allowed = _ERRORS * noise(timed, speed.name)
    return [point for point in timed if abs(math.log(of(point) / of(best))) <= allowed]


def noise(points: Sequence[MeasuredNetwork], name: str) -> float:
    """The standard error of the difference between two networks' times, each the mean of two, as a
    share of them: from how far the two of each network are apart. 0 where none has two."""
    squares = []
    for point in points:
        if len(point.each_time) == 2:
            first, second = (times[name] for times in point.each_time)
            squares.append(math.log(first / second) ** 2)
    # The difference of two times has twice the variance of one; that of two means of two has it.
    return math.sqrt(statistics.fmean(squares) / 2) if squares else 0.0
