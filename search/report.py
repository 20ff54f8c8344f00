"""What a search prints: its front as a table for people, or as one JSON object for programs."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from search.records import Point, SearchResult
from search.settings import SearchOptions, Tracking
from search.storage import parent
from trainables.redaction import without_secrets


def as_json(result: SearchResult) -> dict[str, Any]:
    """The result as plain data.

    A front member is a network that its trial was at `epoch`, after `one_shot` steps of pruning. In it `params` are the searched
    values, as in MLflow and Optuna; the measure of that name, the number of parameters, is `total_params` there.
    """
    ledger = result.ledger
    return {
        "search": result.search,
        "objectives": [objective.name for objective in ledger.objectives],
        "trials": {status: ledger.counts[status] for status in ("completed", "stopped", "failed")},
        "dense": _measures(ledger.dense.last) if ledger.dense and ledger.dense.last else {},
        "front": [
            {
                "trial": point.trial.label,
                "epoch": point.epoch,
                "one_shot": point.step,
                "knee": point is ledger.knee(),
                "run_id": result.run_ids.get(point.trial.label),
                **_measures(point),
                "params": point.trial.values,
            }
            for point in result.front
        ],
        "hypervolume": ledger.hypervolume(),
        "wall_seconds": round(result.wall_seconds, 2),
        "tracking_uri": result.tracking_uri,
        "undelivered": result.undelivered,
    }


def _measures(point: Point) -> dict[str, Any]:
    first = {"val_accuracy": point.measures.get("val_accuracy"), "test_accuracy": point.test_accuracy}
    measures = first | point.measures
    return measures | {"total_params": measures["params"]} if "params" in measures else measures


_SHOWN = ("val_accuracy", "nonzero_params", "params", "layers", "flops")
"""What the table always has a column for."""


def as_text(result: SearchResult, command: str, width: int | None = 160) -> str:
    """The table of the front and the summary, `width` characters wide (None: as wide as the terminal)."""
    console = Console(file=io.StringIO(), width=width)
    if result.front:
        console.print(as_table(result))
    console.print(summary(result, command), highlight=False, markup=False, soft_wrap=True)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def exit_code(result: SearchResult) -> int:
    """What a command that ran a search ends with: 130 if it was cut off, 1 if every trial failed."""
    return 130 if result.interrupted else int(result.all_failed)


def as_table(result: SearchResult) -> Table:
    """The front, most accurate first, with the dense network above it."""
    table = Table(title=f"Front of {result.search}", title_justify="left")
    paths = sorted({path for point in result.front for path in point.trial.values})
    aims = [*(o.name for o in result.ledger.objectives), *(c.name for c in result.ledger.constraints)]
    others = [name for name in dict.fromkeys(aims) if name not in _SHOWN]
    numbers = ("epoch", "one-\nshot", "val acc", "test acc", "non-zero", "of dense", "params", "layers", "FLOPs")
    for name in (
        "trial",
        *numbers,
        *(other.replace("_", "\n") for other in others),
        *(path.replace(".", ".\n") for path in paths),
    ):
        table.add_column(name, justify="left" if name == "trial" else "right", overflow="fold", vertical="bottom")
    dense = result.ledger.dense.last if result.ledger.dense else None
    dense_nonzero = dense.measures["nonzero_params"] if dense else None
    if dense:
        table.add_row(*_row(dense, dense_nonzero, others, paths), end_section=True)
    for point in result.front:
        table.add_row(*_row(point, dense_nonzero, others, paths))
    return table


def _row(point: Point, dense_nonzero: float | None, others: list[str], paths: list[str]) -> list[str]:
    m = point.measures
    share = f"{m['nonzero_params'] / dense_nonzero:.1%}" if dense_nonzero else "-"
    test = "-" if point.test_accuracy is None else f"{point.test_accuracy:.4f}"
    sizes = [f"{m['nonzero_params']:,.0f}", share, f"{m['params']:,.0f}", f"{m['layers']:.0f}", f"{m['flops']:,.0f}"]
    sizes += [_show_measure(m.get(name)) for name in others]
    shown = [_show(point.trial.values.get(path, "")) for path in paths]
    return [point.trial.label, str(point.epoch), str(point.step or ""), f"{m['val_accuracy']:.4f}", test, *sizes, *shown]


def _show_measure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(result: SearchResult, command: str) -> str:
    """What happened, and the next command to type; `command` is how this shell calls slimfront."""
    ledger = result.ledger
    counts = {status: ledger.counts[status] for status in ("completed", "stopped", "failed")}
    trials = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"
    store = "" if result.tracking_uri == Tracking().absolute_uri() else f" --tracking-uri {result.tracking_uri}"
    path = without_secrets(parent(ledger.place))
    kept = "" if path == str(Path(SearchOptions().storage_path).resolve()) else f" --storage-path {path}"
    if not result.front:
        reasons = Counter(trial.reason for trial in ledger.trials if trial.reason).most_common(1)
        trials += f" (most often: {reasons[0][0]})" if reasons else ""
    ends = [f"Review it in MLflow: {command} ui {result.search}{store}"]
    if result.interrupted:
        ends.append(f"Continue it: {command} resume {result.search}{kept}")
    if result.undelivered:
        ends.append(f"MLflow does not have all of it yet; when it answers again: {command} sync {result.search}{kept}")
    head = f"Trials: {trials}; front {len(result.front)}, hypervolume {ledger.hypervolume():.4f}, {result.wall_seconds:.0f} s."
    return "\n".join([head, *ends])
