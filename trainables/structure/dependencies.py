"""Torch-Pruning's dependency graph, walked so that the walk ends."""

from collections.abc import Callable, Sequence
from typing import Any

import torch_pruning
from torch import nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.pruner import function

from slimfront.trainables.structure import pruning_internals

_TIMES = 4
"""A channel of one layer goes with at most so many of the widest one, each for itself."""


class Endless(RuntimeError):
    """What goes with a layer's channels multiplies without end, so that it cannot be right."""


class Dependencies(torch_pruning.DependencyGraph):
    """The graph of what goes with what.

    Torch-Pruning 1.6.1 follows a dependency again for each list of channels that it has not seen
    there. Where a network turns axes about, the channels of one axis are taken for those of
    another: each time round they are multiplied, and that list is always a new one. Here each
    channel is followed once, which finds the same, and there is an end to how many there may be.
    """

    _widest: int | None = None
    """How many channels go in or out of the widest layer."""

    def update(self) -> None:
        """Takes in how many channels there are now, after some were removed."""
        index_mapping.update_index_mapping(self)

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Sequence[int]
    ) -> torch_pruning.Group:
        """All that must go with channels `idxs` of a module, as Torch-Pruning gives it.

        Raises:
            Endless: if that is more than there can be.
        """
        groups = getattr(module, "groups", 1)
        is_depthwise = groups > 1 and groups == getattr(module, "out_channels", 1)
        if is_depthwise:
            pruning_fn = function.prune_depthwise_conv_out_channels
        root = self.module2node[module]
        first = Dependency(
            pruning_fn,
            pruning_fn,
            source=root,
            target=root,
        )
        channels = pruning_internals.channels(idxs)
        followed: dict[Any, set[Any]] = {(root, pruning_fn): set(channels)}
        group = pruning_internals.empty_group(self)
        group.add_dep(first, channels)
        most = _TIMES * self._most_channels()
        waiting = [(first, channels)]
        while waiting:
            source, channels = waiting.pop()
            for dependency in source.target.dependencies:
                if not dependency.is_triggered_by(source.handler):
                    continue
                place = dependency.target, dependency.handler
                seen = followed.setdefault(place, set())
                mapped = dict.fromkeys(_mapped(dependency, channels, most))
                fresh = [channel for channel in mapped if channel not in seen]
                seen.update(fresh)
                if len(seen) > most:
                    raise Endless
                if fresh:
                    group.add_and_merge(dependency, fresh)
                    waiting.append((dependency, fresh))
        pruning_internals.settle(group)
        return group

    def _most_channels(self) -> int:
        if self._widest is None:
            sizes = []
            for parameter in self.model.parameters():
                sizes += parameter.shape[:2]
            self._widest = max(sizes, default=1)
        return self._widest


def _mapped(dependency: Any, channels: list[Any], most: int) -> list[Any]:
    for mapping in dependency.index_mapping:
        if mapping is None:
            continue
        if not mapping.reverse:
            count = len(channels) * pruning_internals.stride(mapping)
            if count > most:
                raise Endless
        channels = mapping(channels)
    return channels
