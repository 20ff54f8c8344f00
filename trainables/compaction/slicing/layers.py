"""The parameters and settings of layers of which some units go."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from slimfront.trainables.compaction.layers import set_module
from slimfront.trainables.compaction.slicing.resized import parameter_like, replace_tensors, settle
from slimfront.trainables.compaction.slicing.stays import Slices
from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.counting import counting
from slimfront.trainables.structure.graph import BatchNorm, module_of, submodule, tensor_at

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


def slice_tensors(slices: Slices) -> None:
    """Takes the units that go out of parameters and buffers, in place."""
    new: dict[int, Tensor] = {}
    for name, axes in slices.walk.tensors.items():
        tensor: Tensor = tensor_at(slices.network, name)
        sliced = _along_axes(slices, tensor.detach(), axes)
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            sliced = _within_groups(slices, owner, sliced)
        if sliced.shape == tensor.shape:
            continue
        new[id(tensor)] = parameter_like(tensor, sliced)
    replace_tensors(slices.network, new)


def _within_groups(slices: Slices, name: str, weight: Tensor) -> Tensor:
    """A layer's weight with what stays of the inputs of each group, if it is a grouped convolution,
    which is told how many groups stay."""
    groups_of_units = slices.walk.groups.get(name)
    if groups_of_units is None:
        return weight
    inputs, _ = groups_of_units
    kept = slices.kept(inputs)
    stay = kept.any(1)
    groups = int(stay.sum())
    convolution: Any = submodule(slices.network, name)
    convolution.groups = groups
    if kept.shape[1] == 1:
        return weight
    rows_of_groups = weight.unflatten(0, (groups, -1))
    columns_of_groups = kept[stay]
    parts = []
    pairs = zip(rows_of_groups, columns_of_groups, strict=True)
    for rows, columns in pairs:
        parts.append(rows[:, columns])
    return torch.cat(parts)


def _along_axes(slices: Slices, tensor: Tensor, axes: list[Tensor | None]) -> Tensor:
    """A tensor with what stays of the units along each of its axes."""
    sizes = tensor.shape
    for axis, units in enumerate(axes):
        if units is None:
            continue
        if units.numel() != sizes[axis]:
            continue
        kept = slices.kept(units)
        if kept.all():
            continue
        places = kept.nonzero().flatten()
        places = places.to(tensor.device)
        tensor = tensor.index_select(axis, places)
    return tensor


def settle_modules(slices: Slices) -> None:
    """Tells each layer its new sizes, in place."""
    seen = set()
    for node in list(slices.network.graph.nodes):
        module = module_of(slices.network, node)
        if module is None:
            continue
        if node.target in seen:
            continue
        seen.add(node.target)
        if isinstance(module, Attention | ScaledDotProduct):
            _settle_attention(slices, node, module)
        else:
            _settle(slices, str(node.target), module)
            _settle_features(slices, node, module)


def _settle_features(slices: Slices, node: Node, module: nn.Module) -> None:
    """Tells a norm of channels that has no tensors of its own, by which it would know, how many
    there are."""
    if not isinstance(module, BatchNorm | InstanceNorm):
        return
    known = slices.known_input(node)
    if module.weight is None and module.running_mean is None and known.dim > 2:
        module.num_features = slices.shape(known)[1]


def _settle_attention(slices: Slices, node: Node, module: Attention | ScaledDotProduct) -> None:
    """Tells attention how many heads stay, and the scale that it had by their width."""
    before = 1
    heads = 1
    if isinstance(module, Attention):
        before = heads = module.heads
        name = str(node.target)
        for units in slices.counted_units(name):
            head_stays = slices.kept(units).any(1)
            heads = int(head_stays.sum())
        module.heads = heads
    query = slices.known_input(node)
    width = slices.old_width(
        query,
        heads_before=before,
        heads_left=heads,
    )
    if width is not None and module.scale is None:
        module.scale = width**-0.5


def _settle(slices: Slices, name: str, module: nn.Module) -> None:
    """Tells a layer its new sizes; one that counts, how many there were."""
    counted = next(slices.counted_units(name), None)
    if counted is None:
        settle(module)
        return
    kept = slices.kept(counted)
    if kept.all():
        settle(module)
        return
    norm = counting(module, kept)
    set_module(slices.network, name, norm)
