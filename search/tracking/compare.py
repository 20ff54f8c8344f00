"""Fronts of finished searches, read from MLflow alone, side by side."""

import csv
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slimfront.search import terminal
from slimfront.search.config.objectives import Objective, losses
from slimfront.search.record.pareto import hypervolume
from slimfront.search.record.picks import Member, described, member_name, quality_of, sizes
from slimfront.search.record.report import show_quality
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
        if other["objectives"] != first["objectives"]:
            raise UserError(
                f"{first['search']} has the objectives {', '.join(first['objectives'])} and "
                f"{other['search']} has "
                f"{', '.join(other['objectives'])}; only searches with the same can be compared"
            )
    objectives = described(first)
    quality = quality_of(first)
    dense = {
        o.name: max(sizes(front["dense"]).get(o.name, 0.0) for front in read) for o in objectives
    }
    fronts = []
    for front in read:
        points = losses([sizes(member) for member in front["front"]], objectives, dense)
        volume = 0.0
        if len(points):
            volume = hypervolume(points, np.ones(len(objectives)))
        fronts.append(
            Front(
                front["search"],
                first["objectives"],
                objectives,
                quality,
                front["dense"],
                front["front"],
                volume,
            )
        )
    return fronts


def read_front(client: MlflowClient, search: str) -> dict[str, Any]:
    """front.json of a search's run. Raises UserError if there is no such search, or it has no front
    yet."""
    run = find_search(client, search)
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = client.download_artifacts(run.info.run_id, "front.json", folder)
            return dict(json.loads(Path(file).read_text()))
        except (MlflowException, OSError, ValueError) as error:
            said = first_line(error)
            raise UserError(f"the front of {search} cannot be read from MLflow: {said}") from None


_SIZES = (
    "nonzero_params",
    "total_params",
    "layers",
    "flops",
    "bytes",
)


def _columns(quality: Objective) -> list[str]:
    """The keys of a row that say what a network is worth."""
    return [quality.name, f"test_{quality.name.removeprefix('val_')}", *_SIZES]


def as_rows(fronts: list[Front]) -> list[dict[str, Any]]:
    """A flat row per network, the dense ones too, with the searched values by path."""
    rows = []
    for front in fronts:
        named = [
            ("dense", front.dense),
            *((member_name(member), member) for member in front.members),
        ]
        for name, member in named:
            row = {"search": front.search, "network": name, "knee": bool(member.get("knee"))}
            row |= {column: member.get(column) for column in _columns(front.quality)}
            values = member.get("params")
            rows.append(row | (values if isinstance(values, dict) else {}))
    return rows


def as_csv(fronts: list[Front]) -> str:
    """The rows as CSV with a header."""
    rows = as_rows(fronts)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(fronts: list[Front]) -> str:
    """All of it as one JSON array, an object per search."""
    keys = ("search", "objectives", "dense", "members", "hypervolume")
    return json.dumps([{key: getattr(front, key) for key in keys} for front in fronts])


def as_text(fronts: list[Front], width: int = 120) -> str:
    """For people: the networks of all searches, each search under its hypervolume."""
    quality = fronts[0].quality
    val = quality.measure.head
    test = val.replace("val ", "test ", 1)
    names = ("network", val, test, "non-zero", "params", "layers", "FLOPs")
    rows: list[list[str]] = []
    ends = []
    for front in fronts:
        rows.append(
            [f"{cell(front.search)}  hypervolume {front.hypervolume:.4f}", *[""] * (len(names) - 1)]
        )
        for row in as_rows([front]):
            name = f"  {cell(row['network'])}{'  (knee)' if row['knee'] else ''}"
            rows.append([name, *(_shown(row, column) for column in _columns(quality)[:-1])])
        ends.append(len(rows) - 1)
    columns = [Column(name, [row[i] for row in rows], left=i == 0) for i, name in enumerate(names)]
    return terminal.as_text(terminal.as_tables("Fronts", columns, width, ends), width)


def _shown(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return "-"
    if column in _SIZES:
        return f"{value:,.0f}"
    return show_quality(value)


def as_png(fronts: list[Front]) -> Figure:
    """The fronts over each other: the first other objective against the metric, or the first two
    where it is none."""
    objectives = fronts[0].described
    size, above = pairs(objectives)[0]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, front in enumerate(fronts):
        members = sorted((sizes(member) for member in front.members), key=lambda m: m[size.name])
        x = [m[size.name] for m in members]
        y = [m[above.name] for m in members]
        axes.plot(
            x,
            y,
            marker="o",
            drawstyle=steps(size),
            color=f"C{index}",
            label=f"{front.search} ({front.hypervolume:.4f})",
        )
        dense = sizes(front.dense)
        if above.name in dense:
            axes.scatter(
                [dense[size.name]], [dense[above.name]], marker="*", s=120, color=f"C{index}"
            )
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


def render(fronts: list[Front], kind: str) -> bytes:
    """The fronts as a `table`, `json`, `csv` or `png` file."""
    if kind == "png":
        picture = io.BytesIO()
        as_png(fronts).savefig(picture, format="png", dpi=120)
        return picture.getvalue()
    if kind == "table":
        return as_text(fronts).encode()
    return (as_json(fronts) + "\n" if kind == "json" else as_csv(fronts)).encode()
