"""The measures of networks as people read them."""

import math

from slimfront.search.record.trials import MeasuredNetwork


def show_quality(value: float | None) -> str:
    """A metric with four digits behind the point, or with five in all where it is large; a dash
    where it is none."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:.5g}"


def quality_and_error(point: MeasuredNetwork, name: str) -> str:
    """The quality `name` of a network, with its standard error where that was taken."""
    deviation = point.deviation(name)
    if deviation is not None:
        mean = show_quality(point.mean(name))
        spread = show_quality(deviation)
        seeds = len(point.replicas)
        return f"{mean} ± {spread} over {seeds} seeds"
    value = show_quality(point.measures[name])
    tested = point.tested or {}
    error = tested.get(f"{name}_se")
    if error is None:
        return value
    spread = show_quality(error)
    return f"{value} ± {spread}"


def show_measure(value: float | None) -> str:
    """Any other measure, with three digits or whole where it is large; a dash where it is none."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
