"""What a search prints: its front as a table for people, or as one JSON object for programs."""

from collections import Counter
from typing import Any

from rich.table import Table

from search.config import Tracking
from search.records import SearchResult, TrialRecord


def as_json(result: SearchResult) -> dict[str, Any]:
    """The result as plain data.

    In a front member `params` are the searched values, as in MLflow and Optuna; the measure of that name, the number
    of parameters, is `total_params` there.
    """
    ledger = result.ledger
    return {
        "search": result.search,
        "trials": {status: len(ledger.with_status(status)) for status in ("completed", "stopped", "failed")},
        "dense": _measures(ledger.dense) if ledger.dense else {},
        "front": [
            {"trial": record.label, "run_id": record.run_id, **_measures(record), "params": record.values}
            for record in result.front
        ],
        "hypervolume": ledger.hypervolume(),
        "wall_seconds": round(result.wall_seconds, 2),
        "tracking_uri": result.tracking_uri,
    }


def _measures(record: TrialRecord) -> dict[str, Any]:
    first = {"val_accuracy": record.measures.get("val_accuracy"), "test_accuracy": record.test_accuracy}
    measures = first | record.measures
    return measures | {"total_params": measures["params"]} if "params" in measures else measures


def as_table(result: SearchResult) -> Table:
    """The front, most accurate first, with the dense network above it."""
    table = Table(title=f"Front of {result.search}", title_justify="left")
    paths = sorted({path for record in result.front for path in record.values})
    numbers = ("val acc", "test acc", "non-zero", "of dense", "params", "layers", "FLOPs")
    for name in ("trial", *numbers, *(path.replace(".", ".\n") for path in paths)):
        table.add_column(name, justify="left" if name == "trial" else "right", overflow="fold", vertical="bottom")
    dense = result.ledger.dense
    dense_nonzero = dense.measures.get("nonzero_params") if dense else None
    if dense and dense.status == "completed":
        table.add_row(*_row(dense, dense_nonzero, paths), end_section=True)
    for record in result.front:
        table.add_row(*_row(record, dense_nonzero, paths))
    return table


def _row(record: TrialRecord, dense_nonzero: float | None, paths: list[str]) -> list[str]:
    m = record.measures
    share = f"{m['nonzero_params'] / dense_nonzero:.1%}" if dense_nonzero else "-"
    test = "-" if record.test_accuracy is None else f"{record.test_accuracy:.4f}"
    sizes = [f"{m['nonzero_params']:,.0f}", share, f"{m['params']:,.0f}", f"{m['layers']:.0f}", f"{m['flops']:,.0f}"]
    return [record.label, f"{m['val_accuracy']:.4f}", test, *sizes, *(_show(record.values.get(path, "")) for path in paths)]


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(result: SearchResult, command: str) -> str:
    """What happened, and the next command to type; `command` is how this shell calls slimfront."""
    ledger = result.ledger
    counts = {status: len(ledger.with_status(status)) for status in ("completed", "stopped", "failed")}
    trials = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"
    store = "" if result.tracking_uri == Tracking().absolute_uri() else f" --tracking-uri {result.tracking_uri}"
    if not result.front:
        reasons = Counter(trial.reason for trial in ledger.trials if trial.reason).most_common(1)
        trials += f" (most often: {reasons[0][0]})" if reasons else ""
    return (
        f"Trials: {trials}; front {len(result.front)}, hypervolume {ledger.hypervolume():.4f}, {result.wall_seconds:.0f} s.\n"
        f"Review it in MLflow: {command} ui {result.search}{store}"
    )
