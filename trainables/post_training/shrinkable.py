"""What of a network can shrink, layer by layer: by which penalty or sparsifier, or why not."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.penalties import PENALTIES, Penalty
from slimfront.trainables.penalties.base import ActiveGroups
from slimfront.trainables.sparsifiers.base import computed_weights, prunable_weights
from slimfront.trainables.structure.removable import removable_units
from slimfront.trainables.structure.shared_units import unknown_operations
from slimfront.trainables.structure.tracing.trace import traced_once

_Acting = dict[str, list[str]]


@dataclass
class LayerReport:
    """What is known of one layer that has parameters."""

    name: str
    kind: str
    """Its class."""
    parameters: int
    by: list[str] = field(default_factory=list)
    """The penalties that act on it, and `sparsifiers` where those do."""
    units: bool = False
    """Whether compaction can remove units of it that are zero."""
    why_not: str = ""
    """Why nothing acts on it."""


@dataclass(frozen=True)
class NetworkReport:
    """What of a network can shrink."""

    layers: list[LayerReport]
    problems: list[str]
    """Sentences on what could not be found out."""

    @property
    def total(self) -> int:
        """All parameters."""
        counts = [layer.parameters for layer in self.layers]
        return sum(counts)

    def reached(self, by: str) -> int:
        """Parameters of the layers that something acts on."""
        count = 0
        for layer in self.layers:
            if by in layer.by:
                count += layer.parameters
        return count


def what_can_shrink(network: nn.Module, sample: Tensor) -> NetworkReport:
    """Finds out what acts on each layer of a network.

    Args:
        sample: (N, *input_shape), what the network sees of a few real inputs.
    """
    layers = {}
    for name, module in network.named_modules():
        count = _own_parameters(module)
        if count:
            kind = type(module).__name__
            layers[name] = LayerReport(name, kind, count)
    problems: list[str] = []
    with traced_once():
        acting = _acting(network, sample, problems)
        removable = _removable(network, sample, problems)
    computed = computed_weights(network)
    for name, layer in layers.items():
        layer.by = _distinct(acting[name])
        layer.units = name in removable or "node" in layer.by
        if not layer.by:
            layer.why_not = _why_not(name, layer.kind, computed)
    reports = list(layers.values())
    distinct = _distinct(problems)
    return NetworkReport(reports, distinct)


def _own_parameters(module: nn.Module) -> int:
    """How many there are in a module itself, those of the modules within it aside."""
    count = 0
    for parameter in module.parameters(recurse=False):
        count += parameter.numel()
    return count


def _acting(network: nn.Module, sample: Tensor, problems: list[str]) -> _Acting:
    """By layer: the penalties that act on it, and `sparsifiers` where those do."""
    acting: _Acting = defaultdict(list)
    for penalty, kind in PENALTIES.items():
        names = _groups(penalty, kind, network, sample, problems)
        for name in names:
            of_layer = acting[name]
            of_layer.append(penalty)
    for weight in prunable_weights(network):
        name, _, _ = weight.rpartition(".")
        of_layer = acting[name]
        of_layer.append("sparsifiers")
    return acting


def _distinct(names: list[str]) -> list[str]:
    """Each once, in order."""
    once = dict.fromkeys(names)
    return list(once)


def _groups(
    name: str, kind: type[Penalty], network: nn.Module, sample: Tensor, problems: list[str]
) -> list[str]:
    """The layers that a penalty acts on; none of one that looks at features."""
    try:
        options = kind(strength=1.0)
        active = options.attach(network, sample)
    except UserError as error:
        problems.append(f"{name}: {error}")
        return []
    except Exception as error:  # of a plug-in, or of options that it needs
        problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")
        return []
    active.close()
    if isinstance(active, ActiveGroups):
        return list(active.groups)
    return []


def _removable(network: nn.Module, sample: Tensor, problems: list[str]) -> set[str]:
    try:
        with torch.random.fork_rng(devices=[]):
            groups = removable_units(network, sample)
            unknown = unknown_operations(network, sample)
    except UserError as error:
        problems.append(f"whole channels: {error}")
        return set()
    if unknown:
        names = ", ".join(f"'{name}'" for name in unknown[:10])
        problems.append(
            f"units that flow through {names} stay: no handler says what that does to them (see "
            "docs/networks.md)"
        )
    return {group.name for group in groups}


def _why_not(name: str, kind: str, computed: list[str]) -> str:
    if name in computed:
        return "its weight is computed anew in every forward pass"
    if "Norm" in kind:
        return "a normalisation: it loses what the layer before it loses"
    return f"no penalty or sparsifier acts on {kind}"
