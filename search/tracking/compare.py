"""Fronts of finished searches, read from MLflow alone, side by side."""

import csv
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slimfront.search import terminal
from slimfront.search.config.objectives import Objective, losses
from slimfront.search.record.front.pareto import hypervolume
from slimfront.search.record.front.picks import Member, described, member_name, quality_of, sizes
from slimfront.search.record.front.told import show_measure, show_quality
from slimfront.search.terminal import Column, cell
from slimfront.search.tracking.figures import pairs, steps
from slimfront.search.tracking.store import find_search
from slimfront.trainables.errors import UserError, first_line


@dataclass(frozen=True)
class Front:
    """The front of a search, as MLflow has it; `hypervolume` is on the scale of all searches that
    were read together."""

    search: str
    objectives: list[str]
    described: list[Objective]
    quality: Objective
    dense: Member
    members: list[Member]
    hypervolume: float


def read_fronts(client: MlflowClient, searches: list[str]) -> list[Front]:
    """The fronts of some searches with the same objectives.

    Their hypervolumes are comparable: each size is scaled by the largest of the searches' dense
    networks (see `Objective.loss`).

    Raises:
        UserError: if there is no such search, it has no front yet, or the objectives differ.
    """
    read = [read_front(client, search) for search in searches]
    first = read[0]
    for other in read[1:]:
        _refuse_other_objectives(first, other)
    objectives = described(first)
    quality = quality_of(first)
    dense = {}
    for objective in objectives:
        of_searches = [sizes(front["dense"]).get(objective.name) or 0.0 for front in read]
        dense[objective.name] = max(of_searches)
    fronts = []
    for front in read:
        measures = [sizes(member) for member in front["front"]]
        points = losses(measures, objectives, dense)
        volume = 0.0
        if len(points):
            volume = hypervolume(points, np.ones(len(objectives)))
        fronts.append(
            Front(
                search=front["search"],
                objectives=first["objectives"],
                described=objectives,
                quality=quality,
                dense=front["dense"],
                members=front["front"],
                hypervolume=volume,
            )
        )
    return fronts


def _refuse_other_objectives(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if other["objectives"] == first["objectives"]:
        return
    one = first["search"]
    another = other["search"]
    those = ", ".join(first["objectives"])
    these = ", ".join(other["objectives"])
    raise UserError(
        f"{one} has the objectives {those} and {another} has "
        f"{these}; only searches with the same can be compared"
    )


def read_front(client: MlflowClient, search: str) -> dict[str, Any]:
    """front.json of a search's run. Raises UserError if there is no such search, or it has no front
    yet."""
    run = find_search(client, search)
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = client.download_artifacts(run.info.run_id, "front.json", folder)
            content = Path(file).read_text()
            front = json.loads(content)
            return dict(front)
        except (MlflowException, OSError, ValueError) as error:
            said = first_line(error)
            raise UserError(f"the front of {search} cannot be read from MLflow: {said}") from None


Row = dict[str, Any]
"""What is told of a network, by column."""
_SIZES = {
    "nonzero_params": "non-zero",
    "total_params": "params",
    "layers": "layers",
    "flops": "FLOPs",
    "bytes": "bytes",
}


def _columns(fronts: list[Front]) -> dict[str, str]:
    """The keys of a row that say what a network is worth, each with its head: the quality, its
    means over seeds where there are any, sizes, and what else is an objective."""
    first = fronts[0]
    val = first.quality.measure.head
    metrics = {first.quality.name: val, _on_test(first): val.replace("val ", "test ", 1)}
    found = dict(metrics)
    of_all = [member for front in fronts for member in (front.dense, *front.members)]
    if any("replicas" in member for member in of_all):
        found["seeds"] = "seeds"
        for name, head in metrics.items():
            found[f"{name}_mean"] = f"{head}\nmean"
            found[f"{name}_std"] = f"{head}\nstd"
    found |= _SIZES
    for objective in first.described:
        name = objective.name
        if name in first.objectives and name not in found and name != "params":
            found[name] = objective.measure.head.replace("_", "\n")
    return found


def _on_test(front: Front) -> str:
    metric = front.quality.name.removeprefix("val_")
    return f"test_{metric}"


def as_rows(fronts: list[Front]) -> list[Row]:
    """A flat row per network, the dense ones too, with the searched values by path."""
    rows = []
    columns = list(_columns(fronts))
    for front in fronts:
        of_dense = _row(front, "dense", front.dense, columns)
        rows.append(of_dense)
        for member in front.members:
            name = member_name(member)
            row = _row(front, name, member, columns)
            rows.append(row)
    return rows


def _row(front: Front, name: str, member: Member, columns: list[str]) -> Row:
    row: Row = {"search": front.search, "network": name}
    for mark in ("recommended", "knee"):
        row[mark] = bool(member.get(mark))
    row["in_region"] = bool(member.get("in_region", name == "dense"))
    known = {**member, **_over_seeds(member)}
    for column in columns:
        row[column] = known.get(column)
    values = member.get("params")
    if isinstance(values, dict):
        # What does not apply is left out; what was chosen to be nothing is told.
        row |= {path: "null" if value is None else value for path, value in values.items()}
    return row


def _over_seeds(member: Member) -> Row:
    """What is known of a network's replicas, by column."""
    replicas = member.get("replicas")
    if not isinstance(replicas, dict):
        return {}
    found: Row = {"seeds": replicas.get("seeds")}
    for name, spread in replicas.items():
        if isinstance(spread, dict):
            found[f"{name}_mean"] = spread.get("mean")
            found[f"{name}_std"] = spread.get("std")
    return found


def as_csv(fronts: list[Front]) -> str:
    """The rows as CSV with a header."""
    rows = as_rows(fronts)
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(fronts: list[Front]) -> str:
    """All of it as one JSON array, an object per search."""
    plain = []
    for front in fronts:
        plain.append(
            {
                "search": front.search,
                "objectives": front.objectives,
                "dense": front.dense,
                "members": front.members,
                "hypervolume": front.hypervolume,
            }
        )
    return json.dumps(plain)


def as_text(fronts: list[Front], width: int = 120, *, everything: bool = False) -> str:
    """For people: the networks of all searches, each search under its hypervolume; of each the
    members that somebody may ship, or `everything`."""
    shown = _columns(fronts)
    shown.pop("bytes", None)  # the widest, and told by the parameters
    rows: list[list[str]] = []
    ends = []
    for front in fronts:
        rows += _lines(front, list(shown), everything=everything)
        last = len(rows) - 1
        ends.append(last)
    names, *others = zip(*rows, strict=True)
    columns = [Column("network", names, left=True)]
    for head, cells in zip(shown.values(), others, strict=True):
        columns.append(Column(head, cells))
    tables = terminal.as_tables("Fronts", columns, width, ends)
    return terminal.as_text(tables, width)


def _lines(front: Front, shown: list[str], *, everything: bool) -> list[list[str]]:
    """The rows of `as_text` about one search, with these columns."""
    blank = [""] * len(shown)
    search = cell(front.search)
    title = f"{search}  hypervolume {front.hypervolume:.4f}"
    lines = [[title, *blank]]
    members = front.members
    if not everything:
        members = _in_region(members)
    looked_at = replace(front, members=members)
    for row in as_rows([looked_at]):
        network = cell(row["network"])
        name = f"  {network}"
        if row["recommended"]:
            name += "  (recommended)"
        if row["knee"]:
            name += "  (knee)"
        values = [_shown(row, column) for column in shown]
        lines.append([name, *values])
    left_out = len(front.members) - len(members)
    if left_out:
        lines.append([f"  {left_out} more: --all", *blank])
    return lines


def _in_region(members: list[Member]) -> list[Member]:
    """Those that somebody may ship; all where none is, or where a front of an older version does
    not say it."""
    inside = [member for member in members if member.get("in_region", True)]
    return inside or members


def _shown(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if column in _SIZES or column == "seeds":
        return f"{value:,.0f}"
    if column.startswith(("val_", "test_")):
        return show_quality(value)
    return show_measure(value)


def as_png(fronts: list[Front]) -> Figure:
    """The fronts over each other: the first other objective against the metric, or the first two
    where it is none."""
    objectives = fronts[0].described
    size, above = pairs(objectives)[0]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, front in enumerate(fronts):
        color = f"C{index}"
        members = [sizes(member) for member in front.members]
        members.sort(key=lambda member: member[size.name])
        axes.plot(
            [member[size.name] for member in members],
            [member[above.name] for member in members],
            marker="o",
            drawstyle=steps(size),
            color=color,
            label=f"{front.search} ({front.hypervolume:.4f})",
        )
        dense = sizes(front.dense)
        x = dense.get(size.name)
        y = dense.get(above.name)
        if x is not None and y is not None:
            axes.scatter([x], [y], marker="*", s=120, color=color)
    if size.measure.logarithmic:
        axes.set_xscale("log")
    axes.set(
        xlabel=size.measure.axis,
        ylabel=above.measure.axis,
        title="fronts (hypervolume); stars: dense networks",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def render(fronts: list[Front], kind: str, *, everything: bool = False) -> bytes:
    """The fronts as a `table` (of `everything`, or of what somebody may ship), `json`, `csv` or
    `png` file."""
    if kind == "png":
        picture = io.BytesIO()
        as_png(fronts).savefig(picture, format="png", dpi=120)
        return picture.getvalue()
    if kind == "table":
        text = as_text(fronts, everything=everything)
    elif kind == "json":
        text = as_json(fronts) + "\n"
    else:
        text = as_csv(fronts)
    return text.encode()
