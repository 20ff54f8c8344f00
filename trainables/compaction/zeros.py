"""Units without a weight that stay in a compact network."""

import logging

from torch import Tensor
from torch.fx import GraphModule

from slimfront.trainables.compaction.coupled import dead_units, remove_coupled_channels
from slimfront.trainables.compaction.exact import in_float64_where_it_can
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.compaction.units import remove_dead_units
from slimfront.trainables.structure.agreement import EXACT, SEEN

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 10
"""Of so many layers a warning says how many units stay."""


def name_what_stays(
    network: GraphModule, inputs: Tensor, options: Compaction, told: set[str]
) -> list[Step]:
    """Names the layers that keep units without a weight, but for those that give the network's
    outputs; warns of those that were not `told` of, and do not stay for a multiple alone."""
    stay = dead_units(network)
    for name in _layers_of_outputs(network):
        stay.pop(name, None)
    wanted = _for_a_multiple(network, inputs, options, set(stay))
    last = _last_ones(network, stay)
    expected = told | wanted
    new = [name for name in stay if name not in expected]
    told.update(new)
    if new:
        _warn(new, stay, last)
    steps: list[Step] = []
    for name, count in stay.items():
        detail = f"{count} units without a weight"
        if name in wanted:
            detail += f", for a multiple of {options.multiple}"
        elif name in last:
            detail += ": the last of its layer"
        steps.append((name, "zeros stay", detail))
    return steps


def _last_ones(network: GraphModule, stay: dict[str, int]) -> set[str]:
    """Those of these layers that have one unit: one of all stays."""
    found = set()
    for name in stay:
        layer = network.get_submodule(name)
        units = [getattr(layer, kind, 0) for kind in ("out_features", "out_channels")]
        if stay[name] == max(units) == 1:
            found.add(name)
    return found


def _warn(names: list[str], stay: dict[str, int], last: set[str]) -> None:
    shown = []
    for name in names[:_NAMED_AT_MOST]:
        which = " (the last)" if name in last else ""
        shown.append(f"{stay[name]:,} of '{name}'{which}")
    more = ""
    if len(names) > _NAMED_AT_MOST:
        more = " …"
    log.warning(
        "units without a weight stay, since removing them would change the outputs, or nothing "
        "here can remove them: %s%s",
        ", ".join(shown),
        more,
    )


def _layers_of_outputs(network: GraphModule) -> set[str]:
    """The layers whose output is one of the network's."""
    found = set()
    for node in network.graph.nodes:
        if node.op != "output":
            continue
        for source in node.all_input_nodes:
            if source.op == "call_module":
                found.add(str(source.target))
    return found


def _for_a_multiple(
    network: GraphModule, inputs: Tensor, options: Compaction, names: set[str]
) -> set[str]:
    """Which of these layers would keep no unit without a weight if any number were right."""
    if options.multiple == 1:
        return set()
    if not names:
        return set()
    fewest, seen, exact = in_float64_where_it_can(network, inputs[:SEEN])
    tolerance = EXACT if exact else options.tolerance
    remove_dead_units(fewest)
    remove_coupled_channels(fewest, seen, tolerance)
    stay = dead_units(fewest)
    return names - stay.keys()
