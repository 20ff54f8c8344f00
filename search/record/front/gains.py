"""What a network has over the dense one, in words."""

import math

from slimfront.search.config.objectives import Objective
from slimfront.search.record.trials import MeasuredNetwork

_SIZES = {"nonzero_params": "non-zero weights", "params": "parameters"}
"""The measures that are told as a share of the dense network's."""


def gains(network: MeasuredNetwork, dense: MeasuredNetwork, quality: Objective) -> str:
    """As in "5.0% of the non-zero weights, 38.2% of the parameters, 2.6 times as fast, -0.3 ± 0.4
    points of validation F1".

    The standard error of the difference takes the errors of both qualities for independent. They
    are of the same examples, so that it is rather too large.
    """
    said = []
    for name, called in _SIZES.items():
        whole = dense.measures.get(name)
        if not whole:
            continue
        share = network.measures[name] / whole
        said.append(f"{share:.1%} of the {called}")
    speed = _speed(network, dense)
    if speed is not None:
        said.append(f"{speed:.2g} times as fast")
    difference = _difference(network, dense, quality)
    if difference:
        said.append(difference)
    return ", ".join(said)


def _speed(network: MeasuredNetwork, dense: MeasuredNetwork) -> float | None:
    """How many times as fast it is, by the times that were taken in quiet where there are any; None
    where none was taken."""
    in_quiet = network.timed_again or {}
    taken = network.measures | in_quiet
    if "speedup" in taken:
        return taken["speedup"]
    time = taken.get("latency_ms")
    whole = dense.measures.get("latency_ms")
    if time and whole:
        return whole / time
    return None


def _difference(network: MeasuredNetwork, dense: MeasuredNetwork, quality: Objective) -> str:
    """By how much its quality differs, in points for a metric in [0, 1], with its standard error
    where both qualities have one; empty where it is no number."""
    name = quality.name
    difference = network.mean(name) - dense.mean(name)
    if not math.isfinite(difference):
        return ""
    factor = 1.0
    unit = quality.measure.axis
    if quality.measure.scale == "share":
        factor = 100.0
        unit = f"points of {unit}"
    spread = ""
    error = _standard_error(network, name)
    dense_error = _standard_error(dense, name)
    if error is not None and dense_error is not None:
        both = factor * math.hypot(error, dense_error)
        spread = f" ± {both:.2g}"
    gained = factor * difference
    return f"{gained:+.2g}{spread} {unit}"


def _standard_error(network: MeasuredNetwork, name: str) -> float | None:
    """The standard error of a network's quality: of the mean of its replicas where there are some,
    else of its one value over the examples."""
    deviation = network.deviation(name)
    if deviation is not None:
        seeds = len(network.replicas)
        return deviation / math.sqrt(seeds)
    tested = network.tested or {}
    return tested.get(f"{name}_se")
