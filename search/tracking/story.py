"""The description of a search for its run in MLflow: what was searched, what to take, and the front
with links to its trials."""

from collections.abc import Callable, Mapping

from slimfront.search.config.objectives import Direction, Objective
from slimfront.search.config.schema import Config
from slimfront.search.config.space import Parameter
from slimfront.search.record.front.gains import gains
from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.report import quality_and_error, show_quality
from slimfront.search.record.trials import MeasuredNetwork, Status
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
    dense = ledger.dense_network

    def link(point: MeasuredNetwork) -> str:
        run_id = run_ids.get(point.trial.label)
        if not run_id:
            return point.name
        route = run_route(experiment_id, run_id)
        return f"[{point.name}]({route[1:]})"

    front = ledger.front.members()
    recommended = ledger.front.recommended()
    if recommended is not None:
        parts.append(f"### Recommended: {link(recommended)}")
        parts.append(_recommended(search, ledger, recommended, dense))
        parts.append(_alternatives(ledger, front, recommended, dense, link))
    if front:
        parts.append(f"### The front, {len(front)} networks")
        chosen = shown(ledger, front)
        parts.append(_table(ledger, chosen.members, recommended, dense, link))
        left_out = chosen.left_out(ledger)
        if left_out:
            parts.append(f"Not shown: {left_out}; `front.json` has all {len(front)}.")
        if len(chosen.members) > _ROWS:
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
    aims = []
    for objective in ledger.objectives:
        wanted = "less"
        if objective.direction is Direction.MAXIMIZE:
            wanted = "more"
        aims.append(f"{wanted} `{objective.name}`")
    lines = [
        f"Searched for {' and '.join(aims)}: {code(config.task.name)} by "
        f"{code(config.model.name)} on {code(config.data.name)}, "
        f"{config.training.epochs} epochs a trial, {len(config.space)} values varied.",
        f"Trials: {_counts(ledger)}. Hypervolume {ledger.front.hypervolume():.4f}.",
    ]
    if config.constraints:
        bounds = [code(f"{name} {bound}") for name, bound in config.constraints.items()]
        lines.append(f"Constraints: {', '.join(bounds)}.")
    space = ["| varied | in |", "| --- | --- |"]
    for path, parameter in config.space.items():
        space.append(f"| {code(path, cell=True)} | {_range(parameter)} |")
    return "\n\n".join(["  \n".join(lines), "\n".join(space)])


def _counts(ledger: Ledger) -> str:
    counts = []
    statuses: tuple[Status, ...] = ("completed", "stopped", "failed", "running")
    for status in statuses:
        count = ledger.counts[status]
        if count:
            counts.append(f"{count} {status}")
    return ", ".join(counts) or "none yet"


def _range(parameter: Parameter) -> str:
    """What a parameter varies in, and where."""
    if not parameter.when:
        return _values(parameter)
    conditions = []
    for path, values in parameter.when.items():
        allowed = " or ".join(map(text, values))
        conditions.append(f"{code(path, cell=True)} is {allowed}")
    return f"{_values(parameter)}, where {' and '.join(conditions)}"


def _values(parameter: Parameter) -> str:
    """What a parameter varies in."""
    if parameter.same_as is not None:
        same = code(parameter.same_as, cell=True)
        if parameter.factor == 1:
            return f"the same as {same}"
        return f"{parameter.factor:g} times {same}"
    if parameter.choices is not None:
        return ", ".join(text(parameter.recorded(choice)) for choice in parameter.choices)
    ends = f"{parameter.low:g} to {parameter.high:g}"
    if parameter.log:
        return f"{ends} (log)"
    return ends


def _recommended(
    search: str, ledger: Ledger, point: MeasuredNetwork, dense: MeasuredNetwork | None
) -> str:
    within = ledger.region.text(1)
    why = f"The smallest network of the front within {within} of the dense network's quality."
    if not ledger.region.is_near(point):
        why = f"No network is within {within} of the dense network's quality; this is the best."
    values = []
    for path, value in point.trial.values.items():
        values.append(f"{code(path)} = {_short(value)}")
    pruned = ""
    if point.step:
        pruned = f", then pruned in one shot, step {point.step}"
    lines = [
        f"{why} {_compared(ledger.quality, point, dense)}",
        f"It was trained with {', '.join(values)}, seed {point.trial.seed}, for {point.epoch} "
        f"epochs{pruned}.",
        f"Export it: {code(f'slimfront export {search} --output FILE.onnx')}",
    ]
    return "  \n".join(lines)


def _alternatives(
    ledger: Ledger,
    front: list[MeasuredNetwork],
    recommended: MeasuredNetwork,
    dense: MeasuredNetwork | None,
    link: Link,
) -> str:
    """The best, and the knee."""
    picks = {"best": front[0]}
    knee = ledger.front.knee()
    if knee is not None:
        picks["the knee, below which quality falls fastest for what is saved"] = knee
    lines = []
    for what, point in picks.items():
        if point is not recommended:
            lines.append(f"- {what}: {link(point)}. {_compared(ledger.quality, point, dense)}")
    return "\n".join(lines)


def _compared(quality: Objective, point: MeasuredNetwork, dense: MeasuredNetwork | None) -> str:
    axis = quality.measure.axis.capitalize()
    said = f"{axis} {quality_and_error(point, quality.name)}"
    weights = point.measures["nonzero_params"]
    layers = point.measures["layers"]
    if dense is None:
        return f"{said}, {weights:,.0f} non-zero parameters in {layers:.0f} layers."
    return (
        f"{said} (dense {show_quality(dense.measures[quality.name])}), "
        f"{weights:,.0f} non-zero parameters, {layers:.0f} of {dense.measures['layers']:.0f} "
        f"layers: {gains(point, dense, quality)}."
    )


def _table(
    ledger: Ledger,
    front: list[MeasuredNetwork],
    recommended: MeasuredNetwork | None,
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
        name = link(point)
        if point is recommended:
            name += " **recommended**"
        rows.append(_row(quality, name, point, dense))
    return "\n".join(rows)


def _row(
    quality: Objective, name: str, point: MeasuredNetwork, dense: MeasuredNetwork | None
) -> str:
    own = point.measures
    weights = own["nonzero_params"]
    share = ""
    if dense:
        share = f"{weights / dense.measures['nonzero_params']:.1%}"
    test = ""
    tested = point.tested or {}
    of_test = tested.get(f"test_{quality.name.removeprefix('val_')}")
    if of_test is not None:
        test = show_quality(of_test)
    cells = [
        name,
        show_quality(own[quality.name]),
        test,
        f"{weights:,.0f}",
        share,
        f"{own['params']:,.0f}",
        f"{own['layers']:.0f}",
        f"{own['flops']:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return text(value)
