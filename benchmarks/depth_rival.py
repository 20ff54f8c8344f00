"""Layers chosen by tables of time and importance: written after LayerMerge (Kim et al. 2024, arXiv
2406.12837), as a rival of ours.

For each layer that can go, the network without it is timed and trained for a few steps; what that
does to accuracy is the layer's importance. The layers that go are those of the greatest sum of
importances whose times together are short enough. The paper finds the best sum by dynamic
programming over the chain of layers; with a dozen of them, all combinations are looked at.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import WholeLayer, take_out, whole_layers
from slimfront.trainables.measures.latency import Latency, time_networks

Judge = Callable[[nn.Module], float]
"""The accuracy of a network after it was trained for a few steps, which it is in place."""


@dataclass(frozen=True)
class Entry:
    """A row of the tables."""

    name: str
    saved: float
    """The share of the whole network's time that goes with it."""
    importance: float
    """How much better the network without it is, in accuracy: mostly below 0."""
    excludes: frozenset[str]
    """What cannot go any more when it has gone."""


def without(network: nn.Module, names: Sequence[str], sample: torch.Tensor) -> GraphModule | None:
    """The network without some layers; None if these cannot go together."""
    graph = traced_in_both_modes(network, sample)
    for name in names:
        layers = _layers(graph, sample)
        if name not in layers:
            return None
        take_out(graph, layers[name])
    return graph


def tables(network: nn.Module, sample: torch.Tensor, judge: Judge) -> list[Entry]:
    """What each layer that can go saves and costs.

    Args:
        network: trained.
        sample: a batch of inputs, that times are taken of one of.
    """
    graph = traced_in_both_modes(network, sample[:3])
    names = set(_layers(graph, sample[:3]))
    whole = judge(copy.deepcopy(graph))
    dense = compact(network, sample).network.eval()
    entries = []
    for name in sorted(names):
        smaller = without(network, [name], sample[:3])
        assert smaller is not None
        left = set(_layers(smaller, sample[:3]))
        small = compact(smaller.eval(), sample).network.eval()
        timed = time_networks([dense, small], sample, Latency(batch_size=1))
        saved = 1 - 1 / timed[1].speedup
        importance = judge(smaller) - whole
        entries.append(Entry(name, saved, importance, frozenset(names - left - {name})))
    return entries


def chosen(entries: Sequence[Entry], speedup: float) -> list[str]:
    """The names of the layers of the greatest sum of importances that together save as much time as
    the speed-up takes."""
    enough = 1 - 1 / speedup
    best: tuple[float, tuple[Entry, ...]] = (-float("inf"), tuple(entries))
    for together in _combinations(entries):
        saved = sum(entry.saved for entry in together)
        importance = sum(entry.importance for entry in together)
        if saved >= enough and importance > best[0]:
            best = (importance, together)
    return [entry.name for entry in best[1]]


def _combinations(entries: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    for count in range(1, len(entries) + 1):
        for together in combinations(entries, count):
            names = {entry.name for entry in together}
            if all(names.isdisjoint(entry.excludes) for entry in together):
                yield together


def _layers(graph: GraphModule, sample: torch.Tensor) -> dict[str, WholeLayer]:
    return {layer.name: layer for layer in whole_layers(graph, sample)}
