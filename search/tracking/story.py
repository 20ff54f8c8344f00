"""The description of a search for its run in MLflow: what was searched, what to take, and the front
with links to its trials."""

from collections.abc import Callable, Mapping

from slimfront.search.config.objectives import Direction, Objective
from slimfront.search.config.schema import Config
from slimfront.search.record.ledger import Ledger, MeasuredNetwork
from slimfront.search.record.report import show_quality
from slimfront.search.tracking.store import run_route
from slimfront.trainables.markdown import code, text

Link = Callable[[MeasuredNetwork], str]
_ROWS = 40
"""So many members of a front are listed; front.json has all of them."""


def describe(
    search: str, config: Config, ledger: Ledger, experiment_id: str, run_ids: Mapping[str, str]
) -> str:
    """Markdown for the tag `mlflow.note.content`; links go to runs of the same MLflow UI."""
    parts = [f"## {text(search)}", _searched(config, ledger)]
    dense = None
    if ledger.dense:
        dense = ledger.dense.last

    def link(point: MeasuredNetwork) -> str:
        run_id = run_ids.get(point.trial.label)
        if run_id:
            return f"[{point.name}]({run_route(experiment_id, run_id)[1:]})"
        return point.name

    front = ledger.front()
    knee = ledger.knee()
    if knee is not None:
        parts += [
            f"### Recommended: {link(knee)}",
            _recommended(ledger, knee, dense),
            _alternatives(ledger, front, knee, dense, link),
        ]
    if front:
        parts += [f"### The front, {len(front)} networks", _table(ledger, front, knee, dense, link)]
        if len(front) > _ROWS:
            parts.append(f"The {_ROWS} best; `front.json` has all {len(front)}.")
    parts.append(
        "Artifacts of this run: `front.html` (interactive, works offline), `front.png`, "
        "`front.json`, `history.png` (hypervolume "
        "over time), `importance.png` (what drives each objective), `layers.png` (which layers "
        "survived), `config.yaml`, "
        "`environment.txt`. The stored network of each front member is a logged model of its "
        "trial's run."
    )
    return "\n\n".join(part for part in parts if part)


def _searched(config: Config, ledger: Ledger) -> str:
    aims = [
        f"{'more' if o.direction is Direction.MAXIMIZE else 'less'} `{o.name}`"
        for o in ledger.objectives
    ]
    done = {
        status: ledger.counts[status] for status in ("completed", "stopped", "failed", "running")
    }
    counts = ", ".join(f"{count} {status}" for status, count in done.items() if count) or "none yet"
    lines = [
        f"Searched for {' and '.join(aims)}: {code(config.task.name)} by "
        f"{code(config.model.name)} on {code(config.data.name)}, "
        f"{config.training.epochs} epochs a trial, {len(config.space)} values varied.",
        f"Trials: {counts}. Hypervolume {ledger.hypervolume():.4f}.",
    ]
    if config.constraints:
        lines.append(
            "Constraints: "
            + ", ".join(code(f"{name} {bound}") for name, bound in config.constraints.items())
            + "."
        )
    space = ["| varied | in |", "| --- | --- |"]
    for path, parameter in config.space.items():
        said = ""
        if parameter.choices is None:
            said = f"{parameter.low:g} to {parameter.high:g}{' (log)' if parameter.log else ''}"
        space.append(
            f"| {code(path, cell=True)} | {said or ', '.join(map(text, parameter.choices or ()))} |"
        )
    return "\n\n".join(["  \n".join(lines), "\n".join(space)])


def _recommended(ledger: Ledger, knee: MeasuredNetwork, dense: MeasuredNetwork | None) -> str:
    said = (
        "The knee of the front: the network below which quality falls fastest "
        f"for what is saved. {_compared(ledger.quality, knee, dense)}"
    )
    values = ", ".join(
        f"{code(path)} = {_short(value)}" for path, value in knee.trial.values.items()
    )
    pruned = ""
    if knee.step:
        pruned = f", then pruned in one shot, step {knee.step}"
    return (
        f"{said}  \nIt was trained with {values}, seed {knee.trial.seed}, for "
        f"{knee.epoch} epochs{pruned}."
    )


def _alternatives(
    ledger: Ledger,
    front: list[MeasuredNetwork],
    knee: MeasuredNetwork,
    dense: MeasuredNetwork | None,
    link: Link,
) -> str:
    """The best, and the smallest that is about as good as the dense network."""
    quality = ledger.quality
    picks = [("best", front[0])]
    if dense:
        bound = quality.near(dense.measures[quality.name], 0.01)
        near = [p for p in front if quality.as_good(p.measures[quality.name], bound)]
        if near:
            smallest = min(near, key=lambda p: p.measures["nonzero_params"])
            within = "1%"
            if quality.measure.scale == "share":
                within = "0.01"
            picks.append((f"smallest within {within} of the dense network's", smallest))
    lines = [
        f"- {what}: {link(point)}. {_compared(quality, point, dense)}"
        for what, point in picks
        if point is not knee
    ]
    return "\n".join(lines)


def _compared(quality: Objective, point: MeasuredNetwork, dense: MeasuredNetwork | None) -> str:
    m = point.measures
    said = f"{quality.measure.axis.capitalize()} {show_quality(m[quality.name])}"
    if dense is None:
        return (
            f"{said}, {m['nonzero_params']:,.0f} non-zero parameters in {m['layers']:.0f} layers."
        )
    d = dense.measures
    return (
        f"{said} (dense {show_quality(d[quality.name])}) with {m['nonzero_params']:,.0f} non-zero "
        "parameters, "
        f"{m['nonzero_params'] / d['nonzero_params']:.1%} of the dense network's "
        f"{d['nonzero_params']:,.0f}, "
        f"in {m['layers']:.0f} layers (dense {d['layers']:.0f})."
    )


def _table(
    ledger: Ledger,
    front: list[MeasuredNetwork],
    knee: MeasuredNetwork | None,
    dense: MeasuredNetwork | None,
    link: Link,
) -> str:
    quality = ledger.quality
    val = quality.measure.head
    test = val.replace("val ", "test ", 1)
    head = ("network", val, test, "non-zero", "of dense", "params", "layers", "FLOPs")
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    if dense:
        rows.append(_row(quality, f"dense: {link(dense)}", dense, dense))
    for point in front[:_ROWS]:
        name = link(point) + (" **knee**" if point is knee else "")
        rows.append(_row(quality, name, point, dense))
    return "\n".join(rows)


def _row(
    quality: Objective, name: str, point: MeasuredNetwork, dense: MeasuredNetwork | None
) -> str:
    m = point.measures
    share = ""
    if dense:
        share = f"{m['nonzero_params'] / dense.measures['nonzero_params']:.1%}"
    tested = (point.tested or {}).get(f"test_{quality.name.removeprefix('val_')}")
    test = ""
    if tested is not None:
        test = show_quality(tested)
    sizes = (
        f"{m['nonzero_params']:,.0f} | {share} | {m['params']:,.0f} | "
        f"{m['layers']:.0f} | {m['flops']:,.0f}"
    )
    return f"| {name} | {show_quality(m[quality.name])} | {test} | {sizes} |"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return text(value)
