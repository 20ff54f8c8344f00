"""`slimfront check --network`: what of a config's network can shrink, layer by layer."""

import torch

from slimfront.search import terminal
from slimfront.search.config.schema import Config
from slimfront.search.terminal import Column
from slimfront.trainables.data.look import looked_at
from slimfront.trainables.models import built
from slimfront.trainables.post_training.shrinkable import LayerReport, what_can_shrink

_SAMPLES = 8


def describe_network(config: Config, width: int | None = None) -> str:
    """A table with a row for each layer that has parameters, and what sparsity counts.

    Raises:
        UserError: if the data or the network cannot be built.
    """
    base = config.candidate({})
    data = looked_at(base.data, torch.device("cpu"), base.task)
    with torch.random.fork_rng(devices=[]):
        network = built(base.model, data)
    sample = data.prepare(data.train.inputs[:_SAMPLES])
    report = what_can_shrink(network, sample)
    names = []
    kinds = []
    counts = []
    causes = []
    for layer in report.layers:
        names.append(layer.name or "(itself)")
        kinds.append(layer.kind)
        counts.append(f"{layer.parameters:,}")
        causes.append(_by(layer))
    columns = [
        Column("layer", names, left=True),
        Column("kind", kinds, left=True),
        Column("parameters", counts),
        Column("shrinks by", causes, left=True),
    ]
    width = width or terminal.console().width
    title = f"{base.model.name}: {report.total:,} parameters"
    table = terminal.as_text(terminal.as_tables(title, columns, width), width)
    reached = report.reached("sparsifiers")
    share = reached / max(report.total, 1)
    lines = [
        f"Layers that sparsifiers act on have {reached:,} of {report.total:,} parameters "
        f"({share:.1%}); `sparsity` counts the weights of these alone.",
        *report.problems,
    ]
    return table + "\n".join(lines) + "\n"


def _by(layer: LayerReport) -> str:
    if not layer.by:
        return layer.why_not
    causes = list(layer.by)
    if layer.units:
        causes.append("whole units go")
    return ", ".join(causes)
