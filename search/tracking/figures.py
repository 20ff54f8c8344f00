"""Pictures of the front: a PNG, and an HTML page that works offline."""

import html
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import plotly.graph_objects as go
from matplotlib.figure import Figure

from slimfront.search.config.objectives import Direction, Objective
from slimfront.search.record.front.region import REGION
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import MeasuredNetwork
from slimfront.search.tracking.store import run_route

_GREY, _BLUE, _ORANGE, _GREEN, _RED = "#999999", "#0072b2", "#e69f00", "#009e73", "#d55e00"
"""Colours that colour-blind people tell apart (Okabe and Ito 2008)."""
_MARGIN = 0.08
_BELOW, _TICKS = 0.2, 4
"""How far below the least number of an axis those stand that have none, as a share of its length,
and in how many parts ticks divide it."""
"""Of the height of a picture, above and below what it is about."""


def front_png(ledger: Ledger, title: str) -> Figure:
    """One panel for each pair of a metric (y) and another objective (x): all trials, the front,
    what is recommended, and the dense network, as far down as somebody may ship it."""
    objectives = ledger.objectives
    panels = pairs(objectives)
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    front = ledger.front.members()
    for index, (size, metric) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.scatter(*_values(_ends(ledger), size, metric), s=18, color=_GREY, label="trials")
        members = sorted(front, key=lambda t: t.measures[size.name])
        axes.plot(
            *_values(members, size, metric),
            marker="o",
            linestyle="-" if len(objectives) == 2 else "",
            drawstyle=steps(size),
            color=_BLUE,
            label="front",
        )
        for point in front:
            deviation = point.deviation(metric.name)
            if deviation is not None:
                axes.errorbar(
                    point.measures[size.name],
                    point.mean(metric.name),
                    yerr=deviation,
                    color=_BLUE,
                    marker="_",
                    capsize=3,
                    alpha=0.6,
                )
        for name, point, color, marker in _marked(ledger):
            axes.scatter(
                *_values([point], size, metric),
                s=110,
                color=color,
                marker=marker,
                zorder=3,
                label=name,
            )
        if dense := _dense(ledger):
            axes.scatter(
                *_values(dense, size, metric),
                marker="*",
                s=140,
                color=_RED,
                label="dense network",
            )
        region = _region(ledger, metric)
        if region is not None:
            axes.set_ylim(*region)
        if size.measure.logarithmic:
            axes.set_xscale("log")
        axes.set(xlabel=size.measure.axis, ylabel=metric.measure.axis, title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    return figure


def front_html(
    ledger: Ledger,
    title: str,
    experiment_id: str = "",
    run_ids: Mapping[str, str] | None = None,
    base_url: str = "",
) -> str:
    """An interactive page with plotly.js inside it, so that it works offline: size against
    quality, and all values in parallel.

    A click on a point opens the run of its trial, where `run_ids` has it, in the MLflow that shows
    the page; at `base_url` where the page was opened from a file. MLflow's artifact viewer lets no
    page open another: there the click shows the run's link.
    """
    objectives = ledger.objectives
    size, metric = pairs(objectives)[0]
    figure = go.Figure()
    front = sorted(ledger.front.members(), key=lambda t: t.measures[size.name])
    dense = _dense(ledger)
    layers = [
        ("trials", _ends(ledger), "markers", _GREY, "o"),
        ("front", front, "lines+markers" if len(objectives) == 2 else "markers", _BLUE, "o"),
    ]
    for name, point, color, marker in _marked(ledger):
        layers.append((name, [point], "markers", color, marker))
    layers.append(("dense network", dense, "markers", _RED, "*"))
    for name, points, mode, color, marker in layers:
        x, y = _values(points, size, metric)
        figure.add_scatter(
            x=x,
            y=y,
            mode=mode,
            name=name,
            marker={
                "color": color,
                "size": 7 if marker == "o" else 14,
                "symbol": _PLOTLY_SYMBOLS[marker],
            },
            line_shape="hv" if steps(size) == "steps-post" else "vh",
            text=[_describe(point) for point in points],
            customdata=[(run_ids or {}).get(point.trial.label, "") for point in points],
            hoverinfo="text",
        )
    figure.update_layout(
        title=title,
        xaxis_title=size.measure.axis,
        yaxis_title=metric.measure.axis,
        template="plotly_white",
    )
    if size.measure.logarithmic:
        figure.update_xaxes(type="log")
    region = _region(ledger, metric)
    if region is not None:
        figure.update_yaxes(range=region)
        figure.update_layout(updatemenus=[_switch(region)])
    open_run = ""
    if run_ids:
        open_run = _OPEN_RUN.replace("ROUTE", run_route(experiment_id, "RUN")).replace(
            "BASE", base_url.rstrip("/")
        )
    page = figure.to_html(
        include_plotlyjs=True, full_html=True, div_id="front", post_script=open_run
    )
    parallel = _parallel(ledger, front).to_html(
        include_plotlyjs=False, full_html=False, div_id="values"
    )
    page = str(page).replace('<div id="front"', f'<div id="front" {_alternative(ledger)}')
    return page.replace("</body>", f"{parallel}</body>")


_PLOTLY_SYMBOLS = {"o": "circle", "D": "diamond", "s": "square", "*": "star"}
"""Matplotlib's marks in Plotly."""


def _marked(ledger: Ledger) -> list[tuple[str, MeasuredNetwork, str, str]]:
    """The members of the front that have a name: (name, network, colour, mark)."""
    found = []
    knee = ledger.front.knee()
    if knee is not None:
        found.append(("knee", knee, _ORANGE, "s"))
    recommended = ledger.front.recommended()
    if recommended is not None:
        found.append(("recommended", recommended, _GREEN, "D"))
    return found


def _region(ledger: Ledger, metric: Objective) -> tuple[float, float] | None:
    """The ends of the quality's axis that show the region that matters, and nothing below it; None
    where that is not known, or empty."""
    if metric.name != ledger.quality.name:
        return None
    inside = [point for point in ledger.front.members() if ledger.region.holds(point)]
    if not inside:
        return None
    values = [point.measures[metric.name] for point in (*inside, *_dense(ledger))]
    values.append(ledger.region.quality_within(REGION))
    low, high = min(values), max(values)
    margin = _MARGIN * ((high - low) or 1.0)
    return low - margin, high + margin


def _switch(region: tuple[float, float]) -> dict[str, Any]:
    """The buttons that choose between the region that matters and all of the front."""
    near = {"label": "what matters", "method": "relayout", "args": [{"yaxis.range": list(region)}]}
    whole = {"label": "all", "method": "relayout", "args": [{"yaxis.autorange": True}]}
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": [near, whole],
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
    }


def _alternative(ledger: Ledger) -> str:
    """What the picture shows, for who cannot see it."""
    said = f"A front of {len(ledger.front.members())} networks."
    recommended = ledger.front.recommended()
    if recommended is not None:
        quality = recommended.measures[ledger.quality.name]
        said += (
            f" Recommended: {recommended.name}, {ledger.quality.measure.axis} {quality:.4g}, "
            f"{recommended.measures['nonzero_params']:,.0f} non-zero parameters."
        )
    return f'role="img" aria-label="{html.escape(said, quote=True)}"'


_OPEN_RUN = """
const front = document.getElementById("front");
const said = front.parentNode.insertBefore(document.createElement("p"), front.nextSibling);
said.id = "run";
said.style.cssText = "font: 14px sans-serif; margin: 0 80px";
said.textContent = "Click a point for the run of its trial.";
const place = location.href.replace(/^blob:/, "");
const base = place.startsWith("http") ? new URL(place).origin : "BASE";
front.on("plotly_click", function (clicked) {
    const run = clicked.points[0].customdata;
    if (!run) { return; }
    const url = base + "ROUTE".replace("RUN", run);
    const link = document.createElement("a");
    link.href = url;
    link.target = "_blank";
    link.textContent = url;
    const shown = clicked.points[0].text.split("<br>")[0].replace(/<[^>]*>/g, "");
    said.replaceChildren(shown + ": ", link);
    // MLflow's artifact viewer does not let pages open others: there the link is copied.
    window.open(url, "_blank");
});
"""


def _parallel(ledger: Ledger, front: list[MeasuredNetwork]) -> go.Figure:
    """The objectives and the searched values of the front's members as parallel coordinates,
    coloured by quality."""
    dimensions = []
    for objective in ledger.objectives:
        name = objective.name
        measured = [point.measures[name] for point in front]
        if objective.measure.logarithmic:
            name = f"log₁₀ {name}"
            measured = [_log10(value) for value in measured]
        dimensions.append(_axis(name, measured))
    for path in dict.fromkeys(path for point in front for path in point.trial.values):
        values = [point.trial.values.get(path) for point in front]
        dimensions.append(_axis(html.escape(path), values))
    quality = ledger.quality.name
    line = {
        "color": [point.measures[quality] for point in front],
        "colorscale": "Viridis",
        "showscale": True,
        "colorbar": {"title": {"text": quality}},
    }
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions, labelangle=-12))
    figure.update_layout(margin={"t": 120, "l": 90}, height=480)
    return figure


def _axis(label: str, values: list[Any]) -> dict[str, Any]:
    """One axis; values that are not numbers become places on it. Of numbers that some networks do
    not have, those stand below the others."""
    there = [value for value in values if value is not None]
    kinds = set(map(type, there))
    if kinds and kinds <= {int, float}:
        return {"label": label} | _numbers(values, min(there), max(there))
    known = sorted({str(value) for value in values})
    places = [known.index(str(value)) for value in values]
    names = [html.escape(name) for name in known]
    return {
        "label": label,
        "values": places,
        "tickvals": list(range(len(known))),
        "ticktext": names,
    }


def _numbers(values: list[Any], least: float, most: float) -> dict[str, Any]:
    """The values of an axis of numbers, from `least` to `most`, and its ticks where some are
    None."""
    if None not in values:
        return {"values": values}
    span = (most - least) or 1.0
    below = least - span * _BELOW
    ticks = (
        [least + span * step / _TICKS for step in range(_TICKS + 1)] if most > least else [least]
    )
    return {
        "values": [below if value is None else value for value in values],
        "tickvals": [below, *ticks],
        "ticktext": ["none", *(f"{tick:.3g}" for tick in ticks)],
    }


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-9))


def pairs(objectives: list[Objective]) -> list[tuple[Objective, Objective]]:
    """(x, y) of each panel: every other objective with the first metric, sizes before further
    metrics, or one with the next where none is a metric."""
    metric = next((one for one in objectives if one.measure.quality), None)
    if metric is None:
        return list(pairwise(objectives))
    others = [one for one in objectives if one != metric]
    others.sort(key=lambda one: one.measure.quality)
    return [(other, metric) for other in others]


def steps(objective: Objective) -> Literal["steps-post", "steps-pre"]:
    """How a front is drawn along an objective: between two members, the one on its better side is
    the best there is."""
    if objective.direction is Direction.MINIMIZE:
        return "steps-post"
    return "steps-pre"


def _ends(ledger: Ledger) -> list[MeasuredNetwork]:
    """The last networks of all trials but the dense reference."""
    return [trial.last for trial in ledger.trials if trial.last]


def _dense(ledger: Ledger) -> list[MeasuredNetwork]:
    if ledger.dense_network:
        return [ledger.dense_network]
    return []


def _values(
    points: list[MeasuredNetwork], size: Objective, metric: Objective
) -> tuple[list[float], list[float]]:
    x = [point.measures[size.name] for point in points]
    y = [point.measures[metric.name] for point in points]
    return x, y


def _describe(point: MeasuredNetwork) -> str:
    pruned = ""
    if point.step:
        pruned = f", one-shot pruning step {point.step}"
    lines = [f"<b>{point.trial.label}</b>, epoch {point.epoch}{pruned}"]
    for name, measured in point.measures.items():
        lines.append(f"{name}: {measured:.4g}")
    for path, value in point.trial.values.items():
        shown = value
        if isinstance(value, float):
            shown = f"{value:.4g}"
        lines.append(html.escape(f"{path} = {shown}"))
    return "<br>".join(lines)
