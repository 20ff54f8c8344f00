"""Why a front is empty, in words."""

import math
from collections import Counter

from slimfront.search.record.ledger import Ledger
from slimfront.trainables.errors import one_line


def why_empty(ledger: Ledger) -> str:
    """Why most of the trials failed, and why no network is on the front, each in brackets; empty
    where neither is known."""
    return _why_trials_failed(ledger) + _why_not(ledger)


def _why_trials_failed(ledger: Ledger) -> str:
    reasons = Counter(trial.reason for trial in ledger.trials if trial.reason)
    if not reasons:
        return ""
    most_often, _ = reasons.most_common(1)[0]
    return f" (most often: {one_line(most_often)})"


def _why_not(ledger: Ledger) -> str:
    """Why none of the networks that were measured is on the front."""
    measured = []
    for trial in ledger.trials:
        for point in trial.points:
            measured += [network.measures for network in (point, *point.pruned)]
    if not measured:
        return ""
    for objective in ledger.objectives:
        name = objective.name
        values = [measures.get(name, math.nan) for measures in measured]
        if not any(map(math.isfinite, values)):
            return f" ({name} was {values[-1]} for every network)"
    for constraint in ledger.constraints:
        nearest = min(measured, key=constraint.violation)
        if constraint.met_by(nearest):
            continue
        name = constraint.name
        sign = ">=" if constraint.at_least else "<="
        reached = nearest.get(name, math.nan)
        return (
            f" (no network keeps {name} {sign} {constraint.bound:g}; the nearest has {reached:.6g})"
        )
    return ""
