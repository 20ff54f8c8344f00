"""What a search prints: its front as a table for people, or as one JSON object for programs."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from slimfront.search import terminal
from slimfront.search.config.settings import SearchOptions, Tracking
from slimfront.search.record.front.empty import why_empty
from slimfront.search.record.front.gains import gains
from slimfront.search.record.front.shown import SIZES, shown
from slimfront.search.record.front.told import quality_and_error, show_measure, show_quality
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.storage import parent
from slimfront.search.record.trials import MeasuredNetwork, Status, replicated
from slimfront.search.terminal import Column, cell
from slimfront.trainables.redaction import without_secrets

_ENDED: tuple[Status, ...] = ("completed", "stopped", "failed")
"""What becomes of trials."""


def as_json(result: SearchResult) -> dict[str, Any]:
    """The result as plain data.

    A front member is a network that its trial was at `epoch`, after `one_shot` steps of pruning. In
    it `params` are the searched values, as in MLflow and Optuna; the measure of that name, the
    number of parameters, is `total_params` there. `timed_again` are the times of what a search
    recommended, taken when nothing ran beside it; those of the search are among its measures.
    `repeated` are proposals that were not trained, since an earlier trial has their values.
    """
    ledger = result.ledger
    quality = ledger.quality.name
    described = {}
    for objective in (ledger.quality, *ledger.objectives):
        described[objective.name] = objective.as_plain()
    trials: dict[str, int] = {}
    for status in _ENDED:
        trials[status] = ledger.counts[status]
    trials["repeated"] = len(ledger.repeated)
    dense = {}
    if ledger.dense_network:
        dense = _measures(ledger.dense_network, quality) | _replicas(ledger.dense_network)
    front = _front(result)
    chosen = next((member for member in front if member["recommended"]), None)
    return {
        "search": result.search,
        "objectives": [objective.name for objective in ledger.objectives],
        "quality": quality,
        "described": described,
        "trials": trials,
        "dense": dense,
        "tolerance": ledger.region.tolerance,
        "recommended": chosen,
        "front": front,
        "hypervolume": ledger.front.hypervolume(),
        "hypervolume_full": ledger.front.hypervolume_full(),
        "wall_seconds": round(result.wall_seconds, 2),
        "tracking_uri": result.tracking_uri,
        "undelivered": result.undelivered,
    }


def _front(result: SearchResult) -> list[dict[str, Any]]:
    """The members of the front as plain data, best first."""
    ledger = result.ledger
    quality = ledger.quality.name
    knee = ledger.front.knee()
    recommended = ledger.front.recommended()
    members = []
    for point in result.front:
        trial = point.trial
        member = {
            "trial": trial.label,
            "epoch": point.epoch,
            "one_shot": point.step,
            "knee": point is knee,
            "recommended": point is recommended,
            "in_region": ledger.region.holds(point),
            "run_id": result.run_ids.get(trial.label),
            **_measures(point, quality),
            **_replicas(point),
            "params": trial.values,
        }
        if point.timed_again is not None:
            member["timed_again"] = point.timed_again
        members.append(member)
    return members


def _measures(point: MeasuredNetwork, quality: str) -> dict[str, Any]:
    """The quality, that on the test split, and whatever else was measured."""
    test = _on_test(quality)
    first = {quality: point.measures.get(quality), test: None}
    tested = point.tested or {}
    known = first | tested | point.measures
    measures = {}
    for name, value in known.items():
        # JSON has no NaN and no infinity, which a metric of the user's may be.
        measures[name] = finite(value)
    if "params" in measures:
        measures["total_params"] = measures["params"]
    return measures


def _on_test(quality: str) -> str:
    """The name on the test split of a metric on the validation split."""
    metric = quality.removeprefix("val_")
    return f"test_{metric}"


def _replicas(point: MeasuredNetwork) -> dict[str, Any]:
    """How often it was trained anew, and the means and standard deviations of that."""
    if not point.replicas:
        return {}
    told: dict[str, Any] = {"seeds": len(point.replicas)}
    for name, spread in replicated(point).items():
        mean, deviation = spread
        told[name] = {"mean": finite(mean), "std": finite(deviation)}
    return {"replicas": told}


def finite(value: float | None) -> float | None:
    """A number, or None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return value


def as_text(
    result: SearchResult, command: str, width: int | None = 160, *, everything: bool = False
) -> str:
    """The table of the front and the summary, `width` characters wide (None: as wide as the
    terminal); of the front what matters (see `shown`), or `everything`."""
    width = width or terminal.console().width
    tables = ""
    if result.front:
        ledger = result.ledger
        chosen = shown(ledger, result.front, everything=everything)
        parts = as_tables(result, width, chosen.members)
        tables = terminal.as_text(parts, width)
        left_out = chosen.left_out(ledger)
        if left_out:
            store = _store(result)
            all_of_them = f"{command} front {result.search} --all{store}"
            tables += f"Not shown: {left_out}; see them: {all_of_them}\n"
    below = summary(result, command)
    return f"{tables}{below}\n"


def exit_code(result: SearchResult) -> int:
    """What a command that ran a search ends with: 130 if it was cut off, 1 if every trial
    failed."""
    if result.interrupted:
        return 130
    return int(result.all_failed)


def as_tables(result: SearchResult, width: int, front: list[MeasuredNetwork]) -> list[Table]:
    """Members of the front, best first, with the dense network above them.

    Where the searched values do not fit beside the measures, they follow in tables of their own,
    with a row for each trial.
    """
    ledger = result.ledger
    dense = ledger.dense_network
    points = list(front)
    sections = []
    if dense:
        points.insert(0, dense)
        sections.append(0)
    title = f"Front of {result.search}"
    measured = [
        Column("trial", [point.trial.label for point in points], left=True),
        Column("epoch", [str(point.epoch) for point in points]),
        Column("one-\nshot", [str(point.step or "") for point in points]),
        *worth(ledger, points),
    ]
    all_columns = measured + _varied(points)
    if terminal.fits(all_columns, width):
        return terminal.as_tables(title, all_columns, width, sections)
    one_of_each = {point.trial.label: point for point in front}
    labels = list(one_of_each)
    points_of_trials = list(one_of_each.values())
    values = _varied(points_of_trials)
    values.insert(0, Column("trial", labels, left=True))
    tables = terminal.as_tables(title, measured, width, sections)
    tables += terminal.as_tables("Their values", values, width)
    return tables


def _other_heads(ledger: Ledger) -> dict[str, str]:
    """What tables call the objectives and constraints that have no column in every table."""
    always = (ledger.quality.name, *SIZES)
    heads = {}
    names = [objective.name for objective in ledger.objectives]
    names += [constraint.name for constraint in ledger.constraints]
    for name in names:
        if name not in always:
            heads[name] = _head(ledger, name)
    return heads


def worth(ledger: Ledger, points: list[MeasuredNetwork]) -> list[Column]:
    """The columns that say what networks are worth: their quality, sizes, and all else that is
    judged."""
    quality = ledger.quality
    dense = ledger.dense_network
    whole = dense.measures["nonzero_params"] if dense else None
    head = quality.measure.head
    test_head = head.replace("val ", "test ", 1)
    test = _on_test(quality.name)
    qualities = []
    test_qualities = []
    for point in points:
        tested = point.tested or {}
        value = point.measures[quality.name]
        on_test = tested.get(test)
        qualities.append(show_quality(value))
        test_qualities.append(show_quality(on_test))
    columns = [
        Column(head, qualities),
        Column(test_head, test_qualities),
        *_over_seeds(points, quality.name, test),
        Column("non-zero", _show_sizes(points, "nonzero_params")),
        Column("of dense", [_show_share(point, whole) for point in points]),
        Column("params", _show_sizes(points, "params")),
        Column("layers", _show_sizes(points, "layers")),
        Column("FLOPs", _show_sizes(points, "flops")),
    ]
    for name, called in _other_heads(ledger).items():
        cells = [show_measure(point.measures.get(name)) for point in points]
        head = called.replace("_", "\n")
        columns.append(Column(head, cells))
    return columns


def _over_seeds(points: list[MeasuredNetwork], *names: str) -> list[Column]:
    """Means and standard deviations of replicas; no column where there are none."""
    if not any(point.replicas for point in points):
        return []
    columns = []
    for name in names:
        cells = []
        for point in points:
            mean, deviation = replicated(point).get(name, (None, None))
            text = show_quality(mean)
            if deviation is not None:
                text += f" ± {show_quality(deviation)}"
            cells.append(text)
        called = name.replace("_", " ")
        columns.append(Column(f"{called}\nover seeds", cells))
    return columns


def _head(ledger: Ledger, name: str) -> str:
    """What the table calls a measure among the objectives or constraints."""
    for objective in ledger.objectives:
        if objective.name == name and not objective.measure.quality:
            return objective.measure.short or name
    for constraint in ledger.constraints:
        if constraint.name == name:
            return constraint.head or name
    return name


def _varied(points: list[MeasuredNetwork]) -> list[Column]:
    """A column for each searched value."""
    paths: set[str] = set()
    for point in points:
        paths |= point.trial.values.keys()
    columns = []
    for path in sorted(paths):
        cells = []
        for point in points:
            value = point.trial.values.get(path, "")
            cells.append(_show(value))
        head = cell(path).replace(".", ".\n")
        columns.append(Column(head, cells))
    return columns


def _show_sizes(points: list[MeasuredNetwork], name: str) -> list[str]:
    return [f"{point.measures[name]:,.0f}" for point in points]


def _show_share(point: MeasuredNetwork, whole: float | None) -> str:
    if not whole:
        return "-"
    share = point.measures["nonzero_params"] / whole
    return f"{share:.1%}"


def _show(value: object) -> str:
    if value is None:  # a choice, as a config has it
        return "null"
    if isinstance(value, float):
        return f"{value:.3g}"
    return cell(value)


def summary(result: SearchResult, command: str) -> str:
    """What happened, and the next command to type; `command` is how this shell calls slimfront."""
    ledger = result.ledger
    store = _store(result)
    path = without_secrets(parent(ledger.place))
    usual_path = Path(SearchOptions().storage_path).resolve()
    kept = ""
    if path != str(usual_path):
        kept = f" --storage-path {path}"
    ends = [f"Review it in MLflow: {command} ui {result.search}{store}"]
    if result.interrupted:
        ends.append(f"Continue it: {command} resume {result.search}{kept}")
    if result.undelivered:
        ends.append(
            f"MLflow does not have all of it yet; when it answers again: {command} sync "
            f"{result.search}{kept}"
        )
    hypervolume = ledger.front.hypervolume()
    head = (
        f"Trials: {_counts(result)}; front {len(result.front)}, hypervolume {hypervolume:.4f}, "
        f"{result.wall_seconds:.0f} s."
    )
    lines = [head, *_recommendation(result, command, kept), *ends]
    return "\n".join(lines)


def _store(result: SearchResult) -> str:
    """The option that names the tracking store, where that is not the default."""
    if result.tracking_uri == Tracking().shown_uri():
        return ""
    return f" --tracking-uri {result.tracking_uri}"


def _recommendation(result: SearchResult, command: str, kept: str) -> list[str]:
    """What to take, and the command that exports it."""
    ledger = result.ledger
    point = ledger.front.recommended()
    if point is None:
        return []
    quality = ledger.quality
    value = quality_and_error(point, quality.name)
    said = f"{quality.measure.axis} {value}"
    baseline = ledger.dense_network
    if baseline is not None:
        dense_value = quality_and_error(baseline, quality.name)
        gained = gains(point, baseline, quality)
        said += f" (dense {dense_value}): {gained}"
        if not ledger.region.is_near(point):
            within = ledger.region.text(1)
            said += f"; none is within {within} of dense, and this is the best"
    if point.timed_again:
        times = []
        for name, time in point.timed_again.items():
            shown_time = show_measure(time)
            times.append(f"{name} {shown_time}")
        all_times = ", ".join(times)
        said += f"; timed again in quiet: {all_times}"
    return [
        f"Recommended: {point.name}, {said}. Export it: {command} export {result.search} --output "
        f"FILE.onnx{kept}"
    ]


def _counts(result: SearchResult) -> str:
    """How many trials ended in which way, and why most of them failed where there is no front."""
    ledger = result.ledger
    counts = []
    for status in _ENDED:
        count = ledger.counts[status]
        if count:
            counts.append(f"{count} {status}")
    trials = ", ".join(counts) or "none"
    if result.front:
        return trials
    return trials + why_empty(ledger)
