"""The description of a search for its run in MLflow: what was searched, what to take, and the front
with links to its trials."""

from collections.abc import Callable, Mapping

from slimfront.search.config.objectives import Direction, Objective
from slimfront.search.config.schema import Config
from slimfront.search.config.space import Parameter
from slimfront.search.record.front.gains import gains
from slimfront.search.record.front.shown import shown
from slimfront.search.record.front.told import quality_and_error
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.report import worth
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
        parts.append(_table(ledger, chosen.members[:_ROWS], recommended, dense, link))
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
    task = code(config.task.name)
    model = code(config.model.name)
    data = code(config.data.name)
    epochs = config.training.epochs
    varied = len(config.space)
    hypervolume = ledger.front.hypervolume()
    lines = [
        f"Searched for {_aims(ledger)}: {task} by {model} on {data}, "
        f"{epochs} epochs a trial, {varied} values varied.",
        f"Trials: {_counts(ledger)}. Hypervolume {hypervolume:.4f}.",
    ]
    if config.constraints:
        bounds = [code(f"{name} {bound}") for name, bound in config.constraints.items()]
        all_bounds = ", ".join(bounds)
        lines.append(f"Constraints: {all_bounds}.")
    space = ["| varied | in |", "| --- | --- |"]
    for path, parameter in config.space.items():
        name = code(path, cell=True)
        values = _range(parameter)
        space.append(f"| {name} | {values} |")
    paragraph = "  \n".join(lines)
    table = "\n".join(space)
    return f"{paragraph}\n\n{table}"


def _aims(ledger: Ledger) -> str:
    aims = []
    for objective in ledger.objectives:
        wanted = "less"
        if objective.direction is Direction.MAXIMIZE:
            wanted = "more"
        aims.append(f"{wanted} `{objective.name}`")
    return " and ".join(aims)


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
    own = _values(parameter)
    if not parameter.when:
        return own
    conditions = []
    for path, values in parameter.when.items():
        name = code(path, cell=True)
        allowed = " or ".join(map(text, values))
        conditions.append(f"{name} is {allowed}")
    all_conditions = " and ".join(conditions)
    return f"{own}, where {all_conditions}"


def _values(parameter: Parameter) -> str:
    """What a parameter varies in."""
    if parameter.same_as is not None:
        same = code(parameter.same_as, cell=True)
        if parameter.factor == 1:
            return f"the same as {same}"
        return f"{parameter.factor:g} times {same}"
    if parameter.choices is not None:
        recorded = map(parameter.recorded, parameter.choices)
        return ", ".join(map(text, recorded))
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
    trial = point.trial
    for path, value in trial.values.items():
        values.append(f"{code(path)} = {_short(value)}")
    all_values = ", ".join(values)
    pruned = ""
    if point.step:
        pruned = f", then pruned in one shot, step {point.step}"
    compared = _compared(ledger.quality, point, dense)
    command = code(f"slimfront export {search} --output FILE.onnx")
    lines = [
        f"{why} {compared}",
        f"It was trained with {all_values}, seed {trial.seed}, for {point.epoch} epochs{pruned}.",
        f"Export it: {command}",
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
    value = quality_and_error(point, quality.name)
    weights = point.measures["nonzero_params"]
    layers = point.measures["layers"]
    if dense is None:
        return f"{axis} {value}, {weights:,.0f} non-zero parameters in {layers:.0f} layers."
    of_dense = dense.measures
    dense_value = quality_and_error(dense, quality.name)
    dense_layers = of_dense["layers"]
    gained = gains(point, dense, quality)
    return (
        f"{axis} {value} (dense {dense_value}), "
        f"{weights:,.0f} non-zero parameters, {layers:.0f} of {dense_layers:.0f} "
        f"layers: {gained}."
    )


def _table(
    ledger: Ledger,
    front: list[MeasuredNetwork],
    recommended: MeasuredNetwork | None,
    dense: MeasuredNetwork | None,
    link: Link,
) -> str:
    points = list(front)
    names = []
    if dense:
        points.insert(0, dense)
        names.append(f"dense: {link(dense)}")
    for point in front:
        mark = " **recommended**" if point is recommended else ""
        names.append(f"{link(point)}{mark}")
    columns = worth(ledger, points)
    heads = [text(column.head.replace("\n", " ")) for column in columns]
    rows = [_cells("network", *heads), "| --- |" + " ---: |" * len(columns)]
    for place, name in enumerate(names):
        rows.append(_cells(name, *(column.cells[place] for column in columns)))
    return "\n".join(rows)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return text(value)
