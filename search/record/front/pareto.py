"""Pareto mathematics: arrays in, arrays out, everything minimised. Directions are flipped in
`objectives.py`."""

import moocore
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""(N, M): N points with M objectives, all minimised."""


def hypervolume(points: Points, reference: NDArray[np.float64]) -> float:
    """Volume dominated by the points and bounded by `reference` (M,), larger is better.

    Points with NaN or infinity, and points that are not better than the reference in every
    objective, add nothing.
    """
    finite = np.isfinite(points).all(axis=1)
    usable = points[finite]
    better = usable < reference
    better_in_all = better.all(axis=1)
    inside = usable[better_in_all]
    if not len(inside):
        return 0.0
    volume = moocore.hypervolume(inside, ref=reference)
    return float(volume)


def ranks(points: Points) -> NDArray[np.int64]:
    """Which front each point is on, (N,): 0 is the non-dominated one, 1 that of the rest, …; −1 for
    one with NaN or infinity."""
    usable = np.isfinite(points).all(axis=1)
    count = len(points)
    found = np.full(count, -1, dtype=np.int64)
    if not usable.any():
        return found
    finite = points[usable]
    found[usable] = moocore.pareto_rank(finite)
    return found


def knee(points: Points) -> int:
    """The index of the point of a front that lies farthest below the plane through its extremes;
    the first of equals.

    Each objective is scaled to [0, 1] over the points, so that the plane is Σ xᵢ = 1 and the knee
    has the smallest sum (Das 1999, On characterizing the knee of the Pareto curve). `points` (N, M)
    are finite, N ≥ 1.
    """
    low = points.min(axis=0)
    high = points.max(axis=0)
    differs = high > low
    spans = high - low
    widths = np.where(differs, spans, 1.0)
    above_least = points - low
    scaled = above_least / widths
    sums = scaled.sum(axis=1)
    least = sums.argmin()
    return int(least)
