"""Pictures of the front: a PNG, and an HTML page that works offline."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
import plotly.graph_objects as go
from matplotlib.figure import Figure

from search.objectives import Direction, Objective
from search.records import Ledger, Point

_LABELS = {
    "val_accuracy": "validation accuracy",
    "params": "parameters",
    "nonzero_params": "non-zero parameters",
    "layers": "weight layers",
    "flops": "FLOPs per input",
    "bytes": "bytes",
}


def front_png(ledger: Ledger, title: str) -> Figure:
    """One panel for each pair of an accuracy (y) and a size (x): all trials, the front, and the dense network."""
    objectives = ledger.objectives
    pairs = _pairs(objectives)
    figure = Figure(figsize=(6.4 * len(pairs), 4.8), layout="constrained")
    front = ledger.front()
    for index, (size, accuracy) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), index + 1)
        axes.scatter(*_values(_ends(ledger), size, accuracy), s=18, color="0.7", label="trials")
        members = sorted(front, key=lambda t: t.measures[size.name])
        axes.plot(
            *_values(members, size, accuracy),
            marker="o",
            linestyle="-" if len(objectives) == 2 else "",
            drawstyle="steps-post",  # between two members the smaller one is the best there is
            color="tab:blue",
            label="front",
        )
        if dense := _dense(ledger):
            axes.scatter(*_values(dense, size, accuracy), marker="*", s=140, color="tab:red", label="dense network")
        if size.name != "layers":
            axes.set_xscale("log")
        axes.set(xlabel=_LABELS[size.name], ylabel=_LABELS[accuracy.name], title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    return figure


def front_html(ledger: Ledger, title: str) -> str:
    """An interactive page of the first size against accuracy, with plotly.js inside it."""
    objectives = ledger.objectives
    size, accuracy = _pairs(objectives)[0]
    figure = go.Figure()
    front = sorted(ledger.front(), key=lambda t: t.measures[size.name])
    dense = _dense(ledger)
    layers = [
        ("trials", _ends(ledger), "markers", "#bbbbbb"),
        ("front", front, "lines+markers" if len(objectives) == 2 else "markers", "#1f77b4"),
        ("dense network", dense, "markers", "#d62728"),
    ]
    for name, points, mode, color in layers:
        x, y = _values(points, size, accuracy)
        figure.add_scatter(
            x=x,
            y=y,
            mode=mode,
            name=name,
            marker_color=color,
            line_shape="hv",
            text=[_describe(point) for point in points],
            hoverinfo="text",
        )
    figure.update_layout(title=title, xaxis_title=_LABELS[size.name], yaxis_title=_LABELS[accuracy.name], template="plotly_white")
    if size.name != "layers":
        figure.update_xaxes(type="log")
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _pairs(objectives: list[Objective]) -> list[tuple[Objective, Objective]]:
    """(x, y) of each panel: sizes against the accuracy, or sizes against each other where no accuracy is an objective."""
    sizes = [o for o in objectives if o.direction is Direction.MINIMIZE]
    accuracies = [o for o in objectives if o.direction is Direction.MAXIMIZE]
    return [(size, a) for a in accuracies for size in sizes] or list(pairwise(sizes))


def _ends(ledger: Ledger) -> list[Point]:
    """The last networks of all trials but the dense reference."""
    return [trial.last for trial in ledger.trials if trial.last]


def _dense(ledger: Ledger) -> list[Point]:
    return [ledger.dense.last] if ledger.dense and ledger.dense.last else []


def _values(points: list[Point], size: Objective, accuracy: Objective) -> tuple[list[float], list[float]]:
    return [p.measures[size.name] for p in points], [p.measures[accuracy.name] for p in points]


def _describe(point: Point) -> str:
    pruned = f", one-shot pruning step {point.step}" if point.step else ""
    lines = [f"<b>{point.trial.label}</b>, epoch {point.epoch}{pruned}"]
    lines += [f"{name}: {value:.4g}" for name, value in point.measures.items()]
    lines += [
        f"{path} = {value:.4g}" if isinstance(value, float) else f"{path} = {value}" for path, value in point.trial.values.items()
    ]
    return "<br>".join(lines)
