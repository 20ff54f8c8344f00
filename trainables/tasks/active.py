"""A task at work on a data set: the loss and the metrics of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfront.trainables.gpu import to_device
from slimfront.trainables.precision import to_float32
from slimfront.trainables.tasks.evaluating import evaluating, fitting_caches
from slimfront.trainables.tasks.metrics import Described, Metric, Tally

if TYPE_CHECKING:
    from slimfront.trainables.tasks.base import Task

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Outputs (N, …), float32, and targets (N, …) to a mean loss, a scalar."""
Prepare = Callable[[Tensor], Tensor]
"""Makes what a network sees of a batch of inputs as they are stored: `Dataset.prepare`."""

_MOST_ENTRIES = 2**24
"""So many entries of inputs are 64 MiB of float32."""


def as_stored(inputs: Tensor) -> Tensor:
    """The `Prepare` of inputs that are stored as networks see them."""
    return inputs


@dataclass(frozen=True)
class ActiveTask:
    """A task at work on a data set."""

    options: Task
    outputs: int
    criterion: Criterion
    metrics: tuple[Metric, ...]
    names: tuple[str, ...] = ()
    stacked: Callable[[Tensor, Tensor], Tensor] | None = None
    """Losses (K,) of outputs (K, B, …) and targets (K, B, …) of K networks, where that is faster
    than `vmap` of the criterion."""
    offset: Tensor | None = None
    """Outputs · `scale` + `offset` are in the unit of the targets; None: they are as they come."""
    scale: Tensor | None = None

    @property
    def mergeable(self) -> bool:
        """Whether all metrics are sums over examples, which processes can add up."""
        return all(metric.whole is None for metric in self.metrics)

    @property
    def quality(self) -> Described:
        """The first metric, by which networks are judged."""
        return self.metrics[0].described

    @property
    def width(self) -> int:
        """How many numbers `state` has."""
        return sum(metric.width for metric in self.metrics)

    def to(self, device: torch.device) -> ActiveTask:
        """The task for networks on `device`: what its loss and metrics need is there, so that no
        step waits for a copy."""
        offset = None
        if self.offset is not None:
            offset = self.offset.to(device)
        scale = None
        if self.scale is not None:
            scale = self.scale.to(device)
        criterion = _moved(self.criterion, device)
        return replace(self, criterion=criterion, offset=offset, scale=scale)

    def worth_going_on(self, scores: Mapping[str, float], before: Mapping[str, float]) -> bool:
        """Whether the quality is at least half of what it was `before`, or its error at most twice
        that; both are metrics of the validation split."""
        quality = self.quality
        key = f"val_{quality.name}"
        now = scores[key]
        then = before[key]
        size = abs(then)
        if quality.better == "larger":
            half = size / 2
            least = then - half
            return now >= least
        most = then + size
        return now <= most

    def about_as_good(
        self, scores: Mapping[str, float], before: Mapping[str, float], tolerance: float
    ) -> bool:
        """Whether the quality is worse than `before` by at most a tolerance: in the unit of a
        metric in [0, 1], of any other as a share of what it was."""
        quality = self.quality
        key = f"val_{quality.name}"
        now = scores[key]
        then = before[key]
        allowed = self._allowed(then, tolerance)
        if quality.better == "larger":
            return now >= then - allowed
        return now <= then + allowed

    def at_best(self, before: Mapping[str, float], tolerance: float) -> float:
        """The quality of a network that is better than `before` by a tolerance."""
        quality = self.quality
        then = before[f"val_{quality.name}"]
        allowed = self._allowed(then, tolerance)
        if quality.better == "larger":
            return then + allowed
        return then - allowed

    def _allowed(self, then: float, tolerance: float) -> float:
        """A tolerance in the unit of the quality."""
        if self.quality.bounded:
            return tolerance
        return tolerance * abs(then)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of outputs (N, …) with targets (N, …), a scalar; computed in float32."""
        outputs = to_float32(outputs)
        outputs = self.options.arrange(outputs)
        targets = self._scaled(targets)
        return self.criterion(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same of K networks: outputs (K, B, …) with targets (K, B, …), (K,)."""
        outputs = to_float32(outputs)
        outputs = self.options.arrange(outputs)
        targets = self._scaled(targets)
        if self.stacked is not None:
            return self.stacked(outputs, targets)
        loss_of_each = torch.func.vmap(self.criterion)
        return loss_of_each(outputs, targets)

    def _scaled(self, targets: Tensor) -> Tensor:
        if self.offset is None or self.scale is None:
            return targets
        device = targets.device
        offset = self.offset.to(device)
        scale = self.scale.to(device)
        return (targets - offset) / scale

    def in_unit(self, outputs: Tensor) -> Tensor:
        """Outputs (…, outputs) in the unit of the targets."""
        if self.offset is None or self.scale is None:
            return outputs
        device = outputs.device
        scale = self.scale.to(device)
        offset = self.offset.to(device)
        return outputs * scale + offset

    def tally(self, members: int | None = None) -> Tally:
        """An accumulator of all metrics, for one network, or for K that see the same examples."""
        return Tally(self.metrics, members)

    def count(self, tally: Tally, outputs: Tensor, targets: Tensor) -> None:
        """Has `tally` take in what networks made of a batch: outputs (N, …) or (K, N, …), targets
        (N, …)."""
        targets = to_device(targets, outputs.device)
        seen = self.seen(outputs)
        tally.update(seen, targets)

    def seen(self, outputs: Tensor) -> Tensor:
        """What metrics see of a network's outputs (N, …)."""
        outputs = to_float32(outputs)
        outputs = self.in_unit(outputs)
        return self.options.arrange(outputs)

    @torch.no_grad()
    def state(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int | None = None,
        prepare: Prepare = as_stored,
    ) -> Tensor:
        """What `scores` makes the metrics of, (n,), float64, of a network in evaluation mode.

        Nothing here waits for a GPU, unless a metric does.

        Args:
            inputs: (N, …), as they are stored.
            targets: (N, …).
            batch_size: if None, 4096, or what makes batches of 64 MiB of float32 if that is less,
                or what `fitting_caches` says.
        """
        tally = self.tally()
        batch_size = batch_size or _at_once(inputs, network)
        with evaluating(network):
            for stored, wanted in self.batches(inputs, targets, batch_size):
                outputs = network(prepare(stored))
                self.count(tally, outputs, wanted)
        return tally.state()

    @staticmethod
    def batches(
        inputs: Tensor, targets: Tensor, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (N, …) and targets (N, …) in batches; sizes as for `state` on a GPU."""
        size = batch_size or _fitting(inputs)
        inputs_of_batches = inputs.split(size)
        targets_of_batches = targets.split(size)
        return zip(inputs_of_batches, targets_of_batches, strict=True)

    @torch.no_grad()
    def outputs_of(
        self,
        network: nn.Module,
        inputs: Tensor,
        prepare: Prepare = as_stored,
    ) -> Tensor:
        """What a network makes of all inputs, in evaluation mode, (N, …), float32; arguments as for
        `state`."""
        made = []
        size = _at_once(inputs, network)
        with evaluating(network):
            for stored in inputs.split(size):
                outputs = network(prepare(stored))
                made.append(to_float32(outputs))
        return torch.cat(made)

    def state_of_shipped(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As `state`, of what a shipped network made of all inputs: (N, …), in the unit of the
        targets."""
        tally = self.tally()
        outputs = to_float32(outputs)
        tally.update(self.options.arrange(outputs), targets)
        return tally.state()

    def scores(self, state: Sequence[float], split: str = "val") -> dict[str, float]:
        """The metrics by name, such as `val_accuracy`, of what `state` gave."""
        found = {}
        begun = 0
        for metric in self.metrics:
            end = begun + metric.width
            totals = state[begun:end]
            key = f"{split}_{metric.name}"
            found[key] = metric.final(totals)
            begun = end
        return found

    def evaluate(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        split: str = "val",
        prepare: Prepare = as_stored,
    ) -> dict[str, float]:
        """The metrics of a network on a split; arguments as for `state`."""
        state = self.state(network, inputs, targets, prepare=prepare)
        return self.scores(state.tolist(), split)

    def evaluate_shipped(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        split: str = "val",
        prepare: Prepare = as_stored,
    ) -> dict[str, float]:
        """The same of a network that gives outputs in the unit of the targets."""
        outputs = self.outputs_of(network, inputs, prepare)
        state = self.state_of_shipped(outputs, targets.cpu())
        return self.scores(state.tolist(), split)


def _moved(criterion: Criterion, device: torch.device) -> Criterion:
    """The criterion with the tensors that it was made with on `device`."""
    if not isinstance(criterion, partial):
        return criterion
    keywords = {}
    for name, value in criterion.keywords.items():
        if isinstance(value, Tensor):
            value = value.to(device)
        keywords[name] = value
    return partial(criterion.func, *criterion.args, **keywords)


def _at_once(inputs: Tensor, network: nn.Module) -> int:
    """How many inputs (N, …) a network is given at once."""
    size = _fitting(inputs)
    cached = fitting_caches(network, inputs[0].numel())
    if cached is None:
        return size
    return min(size, cached)


def _fitting(inputs: Tensor) -> int:
    """How many inputs (N, …) are taken in a batch: 4096, or what makes 64 MiB of float32 if that is
    less."""
    first = inputs[0]
    entries = max(first.numel(), 1)
    fitting = _MOST_ENTRIES // entries
    at_most = min(4096, fitting)
    return max(1, at_most)
