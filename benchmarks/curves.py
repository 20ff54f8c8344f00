"""Searches as curves of hypervolume over epochs spent, and their comparison with one of them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import spread

THIRD = 1 / 3

Curve = list[tuple[int, float]]
"""(epochs spent, hypervolume), rising in both."""


def at(curve: Curve, epochs: float) -> float:
    """The hypervolume after so many epochs."""
    return max((volume for spent, volume in curve if spent <= epochs), default=0.0)


def reached(curve: Curve, volume: float) -> float:
    """The epochs at which a hypervolume was reached; infinite if never."""
    return min((float(spent) for spent, seen in curve if seen >= volume), default=float("inf"))


def shares(curves: Sequence[Curve], others: Sequence[Curve], budget: int) -> list[float]:
    """Per seed, the share of `budget` epochs at which a search has the hypervolume that the other
    has at its end."""
    return [
        reached(curve, at(other, budget)) / budget
        for curve, other in zip(curves, others, strict=True)
    ]


def compare(
    curves: Mapping[str, Sequence[Curve]], reference: str, budget: int
) -> list[dict[str, Any]]:
    """A row per search: hypervolume on the way and at the end, and when it has the reference's
    last; one curve per seed."""
    rows = []
    for name, per_seed in curves.items():
        needed = shares(per_seed, curves[reference], budget)
        row: dict[str, Any] = {"search": name}
        row |= {
            f"hypervolume at {share:.0%}": spread([at(c, share * budget) for c in per_seed], 4)
            for share in (THIRD, 1)
        }
        row["share of the budget (median, range)"] = (
            f"{statistics.median(needed):.2f} ({min(needed):.2f} to {max(needed):.2f})"
        )
        rows.append(row)
    return rows
