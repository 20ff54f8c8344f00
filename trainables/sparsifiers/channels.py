"""Structured sparsity: whole channels, units and heads of attention are zeroed while training, so
that compaction removes them.

The channels that layers share, by residual additions and the like, go together (Fang et al. 2023,
DepGraph, arXiv 2301.12900), on the cubic schedule of Zhu, Gupta 2017, arXiv 1710.01878, eq. 1. A
channel that was zeroed stays 0.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch_pruning.pruner.importance import (
    BNScaleImportance,
    GroupMagnitudeImportance,
    GroupTaylorImportance,
)

from slimfront.trainables.errors import UserError, first_few, first_line
from slimfront.trainables.sparsifiers.base import (
    SPARSIFIERS,
    ActiveSparsifier,
    Setting,
    all_kept,
    out_of_reach,
    prunable_weights,
    taking_part,
)
from slimfront.trainables.sparsifiers.masks import Densities, Scores, Tensors, choose_masks
from slimfront.trainables.sparsifiers.schedules import Scheduled, Updates, cubic_sparsity
from slimfront.trainables.structure.channel_groups import ChannelGroup
from slimfront.trainables.structure.head_groups import HeadGroup, head_groups
from slimfront.trainables.structure.removable import removable_units
from slimfront.trainables.structure.shared_units import SharedUnits

_IMPORTANCES = {
    "norm": GroupMagnitudeImportance,
    "batch-norm": BNScaleImportance,
    "taylor": GroupTaylorImportance,
}
# The same, of an entry of what makes and reads a head, which Torch-Pruning does not know. Without a
# gradient it was not used.
_OF_ENTRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": torch.square,
    "taylor": lambda weight: (weight * (0 if weight.grad is None else weight.grad)).abs(),
}


@SPARSIFIERS.register("channels")
class Channels(Scheduled):
    """Zeroes channels and heads to `sparsity`, the share of both, on a cubic schedule from `start`
    to `end`, in steps of `every`.

    `importance` of a channel, over all layers that share it: `norm`, the mean squared L2 norm of
    what makes and reads it (Li et al. 2017, arXiv 1608.08710); `batch-norm`, its |γ| (Liu et al.
    2017, arXiv 1708.06519); `taylor`, |w · ∂loss/∂w| on the batch of the update (Molchanov et al.
    2019, arXiv 1906.10771). `compare: global` ranks all channels together, relative to the mean of
    their group; `group` drops the same share of each. The outputs of the network stay, and one
    channel of each group. A head counts like a channel, and `norm` and `taylor` are sums over its
    queries, keys, values and what reads it.
    """

    name: Literal["channels"] = "channels"
    start: float = Field(0.1, ge=0, le=1)
    end: float = Field(0.7, ge=0, le=1)
    every: int = Field(10, ge=1)
    importance: Literal["taylor", "norm", "batch-norm"] = "taylor"
    compare: Literal["global", "group"] = "global"

    def attach(self, setting: Setting) -> "ActiveChannels":
        return ActiveChannels(self, setting)


AnyGroup = ChannelGroup | SharedUnits | HeadGroup


def _nothing_to_remove(model: nn.Module) -> str:
    dense = sorted({name.rpartition(".")[0] or name for name in out_of_reach(model)})
    if not dense:
        return (
            "sparsifier: there is no channel in this network that can be removed, "
            "or all are excluded"
        )
    named = first_few([f"'{name}'" for name in dense])
    return (
        "sparsifier: there is no channel in this network that can be removed, or all are "
        f"excluded; {named} has weights that no "
        "sparsifier acts on, and what lies beside such a layer keeps its channels"
    )


def _keep_units(group: AnyGroup, alive: Tensor, name: str, mask: Tensor) -> None:
    """Drops the rows of all units but those that are alive, (units,), from the `mask` of a
    parameter, in place; rows of no unit stay."""
    owners = group.writers[name]
    of_owners = alive.cpu()[owners.clamp(min=0)]
    stay = torch.where(owners >= 0, of_owners, True)
    other_axes = [1] * (mask.dim() - 1)
    by_rows = group.rows(name, mask)
    by_rows &= stay.to(mask.device).view(-1, *other_axes)


class ActiveChannels(ActiveSparsifier):
    """Channel sparsity at work on one network; its masks cover whole rows of weights and biases,
    batch norms included."""

    def __init__(self, options: Channels, setting: Setting) -> None:
        super().__init__(options, setting)
        self.options = options
        self.updates = Updates(options, setting.total_steps)
        self.importance = _IMPORTANCES[options.importance]()
        model = setting.model
        inputs, _ = setting.examples(2)
        part = taking_part(model, options.exclude)
        excluded = prunable_weights(model).keys() - part.keys()
        groups: list[AnyGroup]
        try:
            groups = [*removable_units(model, inputs), *head_groups(model)]
        except UserError as error:
            raise UserError(f"sparsifier: {error}; take another one than channels") from error
        self.groups = [group for group in groups if not excluded & group.parameters]
        if not self.groups:
            raise UserError(_nothing_to_remove(model))
        if options.importance == "batch-norm":
            self._check_batch_norms()
        self.parameters = dict(model.named_parameters())
        self.weights = {}
        self.masks = {}
        for group in self.groups:
            for name in group.writers:
                weight = self.parameters[name]
                self.weights[name] = weight
                self.masks[name] = all_kept(weight)

    def _check_batch_norms(self) -> None:
        for group in self.groups:
            if not isinstance(group, ChannelGroup) or self.importance(group.dependencies) is None:
                raise UserError(
                    "sparsifier.importance: batch-norm needs a batch norm behind each layer; take "
                    "norm or taylor"
                )

    def due(self, step: int) -> bool:
        """Whether channels go."""
        return self.updates.due(step)

    def update(self, step: int) -> None:
        """Zeroes the least important channels."""
        progress = self.updates.progress(step)
        sparsity = cubic_sparsity(progress, self.options.sparsity)
        self.drop(self.scores(), sparsity)

    def scores(self) -> Tensors:
        """The importance of each unit, (units,), by the name of its group.

        Raises:
            UserError: if the units of a group cannot be ranked.
        """
        return {group.name: self._ranked(group) for group in self.groups}

    @torch.no_grad()
    def drop(self, scores: Scores, sparsity: float) -> None:
        """Zeroes the share `sparsity` of the units, those of the lowest scores, (units,) by the
        name of their group."""
        densities: Densities = "global" if self.options.compare == "global" else "uniform"
        kept = choose_masks(scores, sparsity, densities)
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        for group in self.groups:
            alive = kept[group.name]
            if not alive.any():
                best = scores[group.name].argmax()
                alive[best] = True
            for name in group.writers:
                _keep_units(group, alive, name, masks[name])
        self.set_masks(masks)

    def _ranked(self, group: AnyGroup) -> Tensor:
        try:
            return self._scores(group)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            layers = {name.rpartition(".")[0] for name in group.writers}
            others = sorted(layers - {group.name})
            shared = ""
            if others:
                shared = f", which it shares with {', '.join(others)},"
            raise UserError(
                f"sparsifier: the channels of '{group.name}'{shared} cannot be ranked: what reads "
                "them makes several channels of "
                f"one, or one of several ({first_line(error)}); set sparsifier.exclude: "
                f"[{group.name}]"
            ) from error

    def _scores(self, group: AnyGroup) -> Tensor:
        """Importance of each unit, (units,); −1 of those that are gone, so that they stay gone."""
        if isinstance(group, ChannelGroup):
            importance = self.importance(group.dependencies)
            scores = group.per_unit(importance)
        else:
            of_entries = _OF_ENTRIES[self.options.importance]
            scores = group.importance(of_entries, self.parameters)
        alive = group.alive(self.weights).to(scores.device)
        return torch.where(alive, scores, -1.0)
