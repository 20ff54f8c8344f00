"""Structured sparsity: whole channels, units and heads of attention are zeroed while training, so
that compaction removes them.

Which of them go is a knapsack: those that are worth least for what they cost, until the network
costs as little as is wanted.

The channels that layers share, by residual additions and the like, go together (Fang et al. 2023,
DepGraph, arXiv 2301.12900), on the cubic schedule of Zhu, Gupta 2017, arXiv 1710.01878, eq. 1. A
channel that was zeroed stays 0.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
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
    State,
    TargetSparsifier,
    all_kept,
    out_of_reach,
    prunable_weights,
    taking_part,
    why_not_computed,
)
from slimfront.trainables.sparsifiers.masks import Densities, Scores, Tensors, choose_masks, cloned
from slimfront.trainables.sparsifiers.schedules import Times, Updates, cubic_sparsity
from slimfront.trainables.sparsifiers.unit_costs import UnitCosts, worth_least
from slimfront.trainables.structure.channel_groups import ChannelGroup
from slimfront.trainables.structure.graph import rows
from slimfront.trainables.structure.head_groups import HeadGroup, head_groups
from slimfront.trainables.structure.removable import removable_units
from slimfront.trainables.structure.shared_units import (
    SharedUnits,
    added,
    unknown_operations,
    why_untraceable,
)
from slimfront.trainables.structure.tracing.trace import traced_once

log = logging.getLogger(__name__)

AnyGroup = ChannelGroup | SharedUnits | HeadGroup
Rank = Callable[[AnyGroup], Tensor]
"""Gives the importance of each unit of a group, (units,)."""
Parameters = Mapping[str, nn.Parameter]

_CALLED = {"flops": "FLOPs", "params": "parameters", "channels": "channels"}


def _by_gates(_groups: Sequence[AnyGroup], parameters: Parameters) -> Rank:
    def rank(group: AnyGroup) -> Tensor:
        first = next(iter(parameters.values()))
        total = torch.zeros(group.units, device=first.device)
        # What nothing is known to read is gated where it is made.
        gated = group.readers or group.writers
        for name, owners in gated.items():
            change = _first_order(parameters[name])
            if name in group.readers:
                entries = group.columns(name, change)
            else:
                entries = group.rows(name, change)
            total = added(total, owners, entries)
        return total.square()

    return rank


def _first_order(weight: Tensor) -> Tensor:
    """w · ∂loss/∂w; without a gradient it was not used."""
    if weight.grad is None:
        return torch.zeros_like(weight)
    return weight * weight.grad


def _by_taylor(_groups: Sequence[AnyGroup], parameters: Parameters) -> Rank:
    def of_entry(weight: Tensor) -> Tensor:
        return _first_order(weight).abs()

    return _by_torch_pruning(GroupTaylorImportance(), of_entry, parameters)


def _by_norm(_groups: Sequence[AnyGroup], parameters: Parameters) -> Rank:
    return _by_torch_pruning(GroupMagnitudeImportance(), torch.square, parameters)


def _by_torch_pruning(
    importance: Any, of_entry: Callable[[Tensor], Tensor], parameters: Parameters
) -> Rank:
    """An importance of Torch-Pruning's; for units that it does not know, the same is summed over
    entries of what makes and reads them."""

    def rank(group: AnyGroup) -> Tensor:
        if isinstance(group, ChannelGroup):
            return group.per_unit(importance(group.dependencies))
        return group.importance(of_entry, parameters)

    return rank


def _by_batch_norm(groups: Sequence[AnyGroup], _parameters: Parameters) -> Rank:
    importance = BNScaleImportance()

    def rank(group: AnyGroup) -> Tensor:
        if isinstance(group, ChannelGroup):
            found = importance(group.dependencies)
            if found is not None:
                return group.per_unit(found)
        raise UserError(
            "sparsifier.importance: batch-norm needs a batch norm behind each layer; take gate or "
            "norm"
        )

    for group in groups:
        rank(group)
    return rank


_RANKS: dict[str, Callable[[Sequence[AnyGroup], Parameters], Rank]] = {
    "gate": _by_gates,
    "taylor": _by_taylor,
    "norm": _by_norm,
    "batch-norm": _by_batch_norm,
}

_BY_GRADIENTS = ("gate", "taylor")
"""The importances that need gradients."""
_REMEMBERED = 0.8
"""How much of the importance by gates stays from one update to the next: about five batches
count."""


_FROM_SCRATCH = (0.1, 0.7)
_FROM_WEIGHTS = (0.0, 0.15)
"""From when to when channels go, as fractions of training: from trained weights the rest of it is
worth more where they are gone (benchmarks/pretrained.py)."""


@SPARSIFIERS.register("channels")
class Channels(TargetSparsifier):
    """Zeroes channels and heads on a cubic schedule from `start` to `end`, fractions of training,
    in steps of `every`, to `sparsity`: the share `of` the FLOPs of the network, of its parameters,
    or of the channels. Left out, `start` and `end` are 0.1 and 0.7; 0 and 0.15 for a network that
    begins with trained weights, whose channels can be told apart at once.

    `importance` of a channel, over all layers that share it: `gate`, the mean over batches of (w ·
    ∂loss/∂w)², with the sum over all that reads it within the square: by how much the loss would
    change, to the first order, if a gate closed the channel (Molchanov et al. 2019, arXiv
    1906.10771, eq. 8 and section 3.2); `taylor`, |w · ∂loss/∂w| on the batch of the update, as
    Torch-Pruning sums it; `norm`, the mean squared L2 norm of what makes and reads it (Li et al.
    2017, arXiv 1608.08710); `batch-norm`, its |γ| (Liu et al. 2017, arXiv 1708.06519).

    Of FLOPs and parameters, those channels go that are worth least for what they cost. Of channels,
    `compare: global` ranks all together, relative to the mean of their group; `group` drops the
    same share of each. The outputs of the network stay, and one channel of each group. A head
    counts like a channel, and `norm` and `taylor` are sums over its queries, keys, values and what
    reads it.
    """

    name: Literal["channels"] = "channels"
    start: float | None = Field(None, ge=0, le=1)
    end: float | None = Field(None, ge=0, le=1)
    every: int = Field(10, ge=1)
    of: Literal["flops", "params", "channels"] = "flops"
    importance: Literal["gate", "taylor", "norm", "batch-norm"] = "gate"
    compare: Literal["global", "group"] = "global"

    @model_validator(mode="after")
    def _compared(self) -> Self:
        if self.compare == "group" and self.of != "channels":
            raise ValueError(
                f"compare: group drops the same share of the channels of each group, and sparsity "
                f"is of {self.of}; set of: channels, or leave compare out"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        times = self.times(trained=False)
        if times.start > times.end:
            raise ValueError(f"start ({times.start}) is after end ({times.end})")
        return self

    def times(self, *, trained: bool) -> Times:
        """When channels go, in a training that begins with `trained` weights or with random
        ones."""
        start, end = _FROM_SCRATCH
        if trained and self.start is None and self.end is None:
            start, end = _FROM_WEIGHTS
        if self.start is not None:
            start = self.start
        if self.end is not None:
            end = self.end
        return Times(start, end, self.every)

    def refuse_computed(self, model: nn.Module) -> None:
        """Nothing yet: what its channels consist of is known when they are."""

    def attach(self, setting: Setting) -> "ActiveChannels":
        active = ActiveChannels(self, setting)
        active.refuse_computed()
        return active


def _nothing_to_remove(model: nn.Module, inputs: Tensor) -> str:
    dense = set()
    for name in out_of_reach(model):
        layer, _, _ = name.rpartition(".")
        dense.add(layer or name)
    nothing = (
        "sparsifier: there is no channel in this network that can be removed, or all are excluded"
    )
    untraceable = why_untraceable(model, inputs)
    if untraceable is not None:
        return f"{nothing}: {untraceable}"
    unknown = unknown_operations(model, inputs)
    if not dense and unknown:
        names = first_few([f"'{name}'" for name in unknown])
        return f"{nothing}; it is not known here what becomes of channels in {names}"
    if not dense:
        return nothing
    named = first_few([f"'{name}'" for name in sorted(dense)])
    return (
        f"{nothing}; no sparsifier acts on weights of {named}, and what lies beside such a layer "
        "keeps its channels"
    )


def _all_groups(model: nn.Module, inputs: Tensor) -> list[AnyGroup]:
    """The groups of channels and heads. Raises UserError if the network cannot be traced."""
    groups: list[AnyGroup] = []
    try:
        groups += removable_units(model, inputs)
        groups += head_groups(model)
    except UserError as error:
        raise UserError(f"sparsifier: {error}; take another one than channels") from error
    return groups


def _groups_taking_part(
    model: nn.Module, inputs: Tensor, exclude: tuple[str, ...]
) -> list[AnyGroup]:
    """The groups that no excluded layer is part of, and of whose units one can go: the last one of
    a group stays. Raises UserError if there is none."""
    every_weight = prunable_weights(model)
    part = taking_part(model, exclude)
    excluded = every_weight.keys() - part.keys()
    groups = []
    for group in _all_groups(model, inputs):
        takes_part = excluded.isdisjoint(group.parameters)
        if takes_part and group.units > 1:
            groups.append(group)
    if not groups:
        reason = _nothing_to_remove(model, inputs)
        raise UserError(reason)
    return groups


def _without(groups: list[AnyGroup], staying: Collection[str]) -> list[AnyGroup]:
    """The groups but for those that compaction would leave as zeros, which are named."""
    if not staying:
        return groups
    log.warning(
        "sparsifier: the channels of %s stay as they are: they would be zeros in the compact "
        "network, since its code does what would change without them",
        first_few([f"'{name}'" for name in staying]),
    )
    return [group for group in groups if group.name not in staying]


def _keep_units(group: AnyGroup, alive: Tensor, name: str, mask: Tensor) -> None:
    """Drops the rows of all units but those that are alive, (units,), from the `mask` of a
    parameter, in place; rows of no unit stay."""
    owners = group.writers[name]
    units = alive.cpu()
    of_owners = units[owners.clamp(min=0)]
    is_owned = owners >= 0
    stay = torch.where(is_owned, of_owners, True)
    stay = stay.to(mask.device)
    by_rows = group.rows(name, mask)
    by_rows &= rows(stay, mask)


class ActiveChannels(ActiveSparsifier):
    """Channel sparsity at work on one network; its masks cover whole rows of weights and biases,
    batch norms included."""

    def __init__(self, options: Channels, setting: Setting) -> None:
        super().__init__(options, setting)
        self.options = options
        times = options.times(trained=setting.trained)
        self.updates = Updates(times, setting.total_steps)
        model = setting.model
        inputs, _ = setting.examples(2)
        with traced_once():
            groups = _groups_taking_part(model, inputs, options.exclude)
        if setting.stays is not None:
            groups = _without(groups, setting.stays(groups))
        self.groups = groups
        # A parameter that layers share has the name of each.
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        ranked_by = _RANKS[options.importance]
        self.rank = ranked_by(groups, self.parameters)
        self.opened: list[nn.Parameter] = []
        """Frozen parameters that have gradients in this step, for their channels to be ranked."""
        self.frozen_gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        """Those gradients, which the optimiser must not see."""
        self.gates: Tensors = {}
        """The importance by gates that is remembered, (units,) by the name of the group."""
        self.costs: UnitCosts | None = None
        if options.of != "channels":
            self.refuse_computed()
            costs = UnitCosts(model, groups, inputs, options.of)
            _say_what_can_go(costs, options)
            self.costs = costs
        self.weights = {}
        self.masks = {}
        for group in self.groups:
            for name in group.writers:
                weight = self.parameters[name]
                self.weights[name] = weight
                self.masks[name] = all_kept(weight)

    def refuse_computed(self) -> None:
        """Raises UserError where what a group consists of is no parameter: masks do not last in
        what is computed anew in each step."""
        for group in self.groups:
            for name in (*group.writers, *group.readers):
                if name not in self.parameters:
                    raise UserError(why_not_computed(self.options.name, name))

    def due(self, step: int) -> bool:
        """Whether channels go."""
        return self.updates.due(step)

    def before_batch(self, step: int) -> None:
        """Has frozen parameters get gradients where channels are ranked by those after this
        step."""
        if not self.due(step) or self.options.importance not in _BY_GRADIENTS:
            return
        for group in self.groups:
            for name in (*group.writers, *group.readers):
                parameter = self.parameters.get(name)
                if parameter is None or parameter.requires_grad:
                    continue
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    self.opened.append(parameter)

    def before_step(self, step: int) -> None:
        """Keeps the gradients of frozen parameters from the optimiser."""
        if self.opened:
            self.frozen_gradients = [(one, one.grad) for one in self.opened]
            self.close()
        super().before_step(step)

    def close(self) -> None:
        """Frozen parameters are frozen again."""
        for parameter in self.opened:
            parameter.grad = None
            parameter.requires_grad_(False)
        self.opened = []

    def update(self, step: int) -> None:
        """Zeroes the least important channels.

        Raises:
            UserError: if there are frozen parameters, and nobody has looked at the gradients.
        """
        if self.opened:
            self.close()
            raise UserError(
                "sparsifier channels: channels of frozen layers are ranked by the gradients of the "
                "step, and before_step was not called; call it between the backward pass and the "
                "optimiser's step"
            )
        progress = self.updates.progress(step)
        sparsity = cubic_sparsity(progress, self.options.sparsity)
        for parameter, gradient in self.frozen_gradients:
            parameter.grad = gradient
        now = self.scores()
        for parameter, _ in self.frozen_gradients:
            parameter.grad = None
        self.frozen_gradients = []
        scores = self._remembered(now)
        self.drop(scores, sparsity)

    def scores(self) -> Tensors:
        """The importance of each unit by the gradients that there are, (units,) by the name of its
        group; −1 of those that are gone, so that they stay gone.

        Raises:
            UserError: if the units of a group cannot be ranked.
        """
        scores = {}
        for group in self.groups:
            ranked = self._ranked(group)
            alive = group.alive(self.weights).to(ranked.device)
            scores[group.name] = torch.where(alive, ranked, -1.0)
        return scores

    def _remembered(self, scores: Tensors) -> Tensors:
        """The scores with those of earlier updates; other importances than by gates forget."""
        if self.options.importance != "gate":
            return scores
        share_of_now = 1 - _REMEMBERED
        for name, now in scores.items():
            before = self.gates.get(name, now)
            remembered = _REMEMBERED * before
            mean = remembered + share_of_now * now
            is_gone = now < 0
            self.gates[name] = torch.where(is_gone, now, mean)
        return self.gates

    @torch.no_grad()
    def drop(self, scores: Scores, sparsity: float) -> None:
        """Zeroes units until the share `sparsity` is gone, those of the lowest scores, (units,) by
        the name of their group."""
        if self.costs is None:
            kept = self._kept_channels(scores, sparsity)
        else:
            kept = self._worth_their_cost(scores, self.costs, sparsity)
        masks = cloned(self.masks)
        for group in self.groups:
            units = kept[group.name]
            for name in group.writers:
                _keep_units(group, units, name, masks[name])
        self.set_masks(masks)

    def counted(self, parameters: Mapping[str, Tensor]) -> int | None:
        """How many parameters the network with these will have when its zero units are gone; None
        if that was not counted on, with `of: channels`."""
        if self.costs is None:
            return None
        alive = {group.name: group.alive(parameters) for group in self.groups}
        return self.costs.entries(alive)

    def _worth_their_cost(self, scores: Scores, costs: UnitCosts, sparsity: float) -> Tensors:
        """The units that stay where `sparsity` is a share of the costs, (units,) bool by the name
        of their group."""
        alive = {}
        for group in self.groups:
            alive[group.name] = group.alive(self.weights)
        share = 1 - sparsity
        allowed = share * costs.whole
        return worth_least(scores, costs, alive, allowed)

    def _kept_channels(self, scores: Scores, sparsity: float) -> Tensors:
        """The units that stay where `sparsity` is a share of them, (units,) bool by the name of
        their group."""
        densities: Densities = "uniform"
        if self.options.compare == "global":
            densities = "global"
            scores = {name: _relative(of_group) for name, of_group in scores.items()}
        kept = choose_masks(scores, sparsity, densities)
        for name, alive in kept.items():
            if alive.any():
                continue
            best = scores[name].argmax()
            alive[best] = True
        return kept

    def _ranked(self, group: AnyGroup) -> Tensor:
        try:
            return self.rank(group)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            layers = {name.rpartition(".")[0] for name in group.writers}
            layers.discard(group.name)
            shared = ""
            if layers:
                others = ", ".join(sorted(layers))
                shared = f", which it shares with {others},"
            raise UserError(
                f"sparsifier: the channels of '{group.name}'{shared} cannot be ranked: what reads "
                "them makes several channels of "
                f"one, or one of several ({first_line(error)}); set sparsifier.exclude: "
                f"[{group.name}]"
            ) from error

    def state_dict(self) -> State:
        """As of every sparsifier, and what is remembered of the importance."""
        state = super().state_dict()
        state["gates"] = cloned(self.gates)
        return state

    def load_state_dict(self, state: State) -> None:
        """Continues bit-exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        gates = state.get("gates", {})
        self.gates = cloned(gates)


def _relative(scores: Tensor) -> Tensor:
    """Scores relative to the mean of those that are not gone, which stay −1."""
    there = scores >= 0
    if not there.any():
        return scores
    tiny = torch.finfo(scores.dtype).tiny
    mean = scores[there].mean().clamp_min(tiny)
    return torch.where(there, scores / mean, scores)


_NEARLY = 0.9
"""Whoever asks for more of what can go leaves hardly anything of the layers that it is of."""
_STAYS = 0.05
"""A layer of which so much of the network stays is named."""


def _say_what_can_go(costs: UnitCosts, options: Channels) -> None:
    """Warns where even one channel of each group costs more than what is wanted, or hardly less."""
    least = costs.least() / costs.whole
    most = 1 - least
    if options.sparsity <= _NEARLY * most:
        return
    stay = [f"'{name}'" for name, share in costs.staying().items() if share >= _STAYS]
    rest = f"the rest of the network stays, mostly {first_few(stay)}" if stay else "the rest stays"
    what_follows = f"sparsity {options.sparsity:g} is not reached"
    if options.sparsity <= most:
        what_follows = f"sparsity {options.sparsity:g} leaves hardly anything of the other layers"
    log.warning(
        "sparsifier: %s of the %s can go at most, since %s; %s",
        f"{most:.1%}",
        _CALLED[options.of],
        rest,
        what_follows,
    )
