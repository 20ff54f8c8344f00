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
        if whole:
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
    taken = network.measures | (network.timed_again or {})
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
    difference = network.mean(quality.name) - dense.mean(quality.name)
    if not math.isfinite(difference):
        return ""
    factor, unit = 1.0, quality.measure.axis
    if quality.measure.scale == "share":
        factor, unit = 100.0, f"points of {quality.measure.axis}"
    errors = [_standard_error(one, quality.name) for one in (network, dense)]
    spread = ""
    if None not in errors:
        error = math.hypot(*(error for error in errors if error is not None))
        spread = f" ± {factor * error:.2g}"
    return f"{factor * difference:+.2g}{spread} {unit}"


def _standard_error(network: MeasuredNetwork, name: str) -> float | None:
    """The standard error of a network's quality: of the mean of its replicas where there are some,
    else of its one value over the examples."""
    deviation = network.deviation(name)
    if deviation is not None:
        return deviation / math.sqrt(len(network.replicas))
    return (network.tested or {}).get(f"{name}_se")
