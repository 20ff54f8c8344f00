"""What we use of Torch-Pruning although it does not document it, behind names of ours.

`tests/test_undocumented.py` says with the version of Torch-Pruning what is gone. Tried with 1.6.1.
"""

from collections.abc import Iterable
from typing import Any

import torch_pruning
from torch_pruning import ops
from torch_pruning._helpers import GroupItem, _HybridIndex

PLAIN_OPERATIONS = (
    ops._ConcatOp,
    ops._SplitOp,
    ops._ReshapeOp,
    ops._SliceOp,
    ops._ElementWiseOp,
    ops._ExpandOp,
)
"""What stands in its graph for operations without parameters whose channels it follows."""


def channels(numbers: Iterable[int]) -> list[Any]:
    """Channels of the layer that a group starts from: each knows its number there, too."""
    return [_HybridIndex(idx=number, root_idx=number) for number in numbers]


def empty_group(graph: torch_pruning.DependencyGraph) -> torch_pruning.Group:
    """A group of no dependencies, which knows its graph."""
    group = torch_pruning.Group()
    group._DG = graph
    return group


def settle(group: torch_pruning.Group) -> None:
    """Gives each item of a group its channels as plain numbers, here and in the first layer."""
    for place, (dependency, followed) in enumerate(group.items):
        here = []
        in_first_layer = []
        for channel in followed:
            here.append(channel.idx)
            in_first_layer.append(channel.root_idx)
        item = GroupItem(dependency, here)
        item.root_idxs = in_first_layer
        group[place] = item


def stride(mapping: Any) -> int:
    """How many channels a mapping makes of each: more than one behind a flattened map."""
    found: int = getattr(mapping, "_stride", 1)
    return found
