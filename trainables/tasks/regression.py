"""Regression: numbers for each example."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks.active import ActiveTask, Criterion
from slimfront.trainables.tasks.base import TASKS, Encoded, Task
from slimfront.trainables.tasks.metrics import (
    Described,
    Known,
    Metric,
    MetricOptions,
    Whole,
    ratio,
)
from slimfront.trainables.tasks.targets import as_tensor, is_column

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": nn.functional.mse_loss,
    "mae": nn.functional.l1_loss,
    "huber": nn.functional.huber_loss,
}


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch: of the squared errors, and how many there are: (2,)."""
    errors = _errors(outputs, targets)
    squared = errors.square()
    return _total_and_count(squared)


def absolute_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same of the absolute errors."""
    errors = _errors(outputs, targets)
    absolute = errors.abs()
    return _total_and_count(absolute)


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    errors = _like(outputs, targets) - targets
    return errors.double()


def _total_and_count(errors: Tensor) -> Tensor:
    total = errors.sum()
    number = errors.numel()
    count = torch.full_like(total, number)
    return torch.stack([total, count])


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """What R² is made of, of one target (N,): squared errors, Σy, Σy² and how many, (4,)."""
    y = targets.double()
    made = _like(outputs, targets)
    errors = made.double() - y
    squared_errors = errors.square()
    error = squared_errors.sum()
    total = y.sum()
    y_squared = y.square()
    squared = y_squared.sum()
    number = y.numel()
    count = torch.full_like(error, number)
    return torch.stack([error, total, squared, count])


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs (N, 1) as targets (N,) are."""
    return outputs.reshape(targets.shape)


def _root(totals: Sequence[float]) -> float:
    mean = ratio(totals)
    return math.sqrt(mean)


def _r2(totals: Sequence[float]) -> float:
    errors, total, square, count = totals
    part_of_mean = total * total / count
    spread = square - part_of_mean
    if spread > 0:
        unexplained = errors / spread
        return 1 - unexplained
    return math.nan


_OWN = {
    "mse": (Described("mse", "smaller"), squared_errors, ratio, 2),
    "rmse": (Described("rmse", "smaller"), squared_errors, _root, 2),
    "mae": (Described("mae", "smaller"), absolute_errors, ratio, 2),
}


@TASKS.register("regression")
class Regression(Task):
    """Numbers (N,) or (N, k) for each example; the loss is `mse`, `mae` or `huber`, and the quality
    is the mean squared error.

    With `standardise` the network is trained on targets less their mean, divided by their standard
    deviation; metrics are in the targets' own unit, and the network that ships gives that unit. A
    loss and metrics of the user's see outputs in the shape of the targets, (N,) for one number.
    `delta` is where `huber` turns from squares to a line.
    """

    name: Literal["regression"] = "regression"
    standardise: bool = True
    delta: float = Field(1.0, gt=0)

    KNOWN: ClassVar[Mapping[str, Known]] = {
        "r2": Known("regression.R2Score", bounded=False),
        "mape": Known("regression.MeanAbsolutePercentageError", "smaller", bounded=False),
        "smape": Known("regression.SymmetricMeanAbsolutePercentageError", "smaller", bounded=False),
        "explained_variance": Known("regression.ExplainedVariance", bounded=False),
        "pearson": Known("regression.PearsonCorrCoef", bounded=False),
        "spearman": Known("regression.SpearmanCorrCoef", bounded=False),
    }
    DEFAULT: ClassVar[tuple[str, ...]] = ("mse", "r2")
    LOSSES: ClassVar[tuple[str, ...]] = tuple(_LOSSES)

    @classmethod
    def metric_names(cls) -> tuple[str, ...]:
        names = (*_OWN, *cls.KNOWN)
        distinct = dict.fromkeys(names)
        return tuple(distinct)

    def describe(self, name: str) -> Described:
        if name in _OWN:
            described, *_ = _OWN[name]
            return described
        return super().describe(name)

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        targets = as_tensor(given, self.name)
        if is_column(targets):
            targets = targets.squeeze(1)
        if targets.is_complex() or targets.dim() > 2:
            raise self.wrong_targets(targets)
        found = targets.float()
        _refuse_too_large(found)
        _refuse_all_the_same(found)
        count = 1
        if targets.dim() == 2:
            _, count = targets.shape
        return Encoded(found, count)

    def attach(self, targets: Tensor, encoded: Encoded) -> ActiveTask:
        active = super().attach(targets, encoded)
        if not self.standardise:
            return active
        mean = targets.mean(0)
        std = targets.std(0)
        varies = std > 0
        scale = torch.where(varies, std, 1.0)
        offset = mean.reshape(-1)
        scale = scale.reshape(-1)
        return replace(active, offset=offset, scale=scale)

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        chosen = self.loss or "mse"
        assert isinstance(chosen, str)
        loss = _LOSSES[chosen]
        if chosen == "huber":
            loss = partial(loss, delta=self.delta)
        return partial(_error, of=loss)

    def unsaid_of_weights(self) -> str | None:
        if not self.standardise or "standardise" in self.model_fields_set:
            return None
        return (
            "task.standardise, by which networks learn targets of mean 0 and deviation 1: set it "
            "to false if the trained network gives numbers in the unit of the targets, and to true "
            "if it was trained on standardised ones"
        )

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        name = str(options.name)
        if name in _OWN:
            return _own(name, options)
        of_one_number = name == "r2" and outputs == 1
        if of_one_number and not options.args:
            described = Described(options.key, "larger")
            return Metric(described, squares, _r2, width=4)
        of_outputs = self._of_outputs(name, outputs)
        found = self.KNOWN[name].metric(options, of_outputs)
        return _like_targets(found)

    def own_metric(self, options: MetricOptions) -> Metric:
        own = super().own_metric(options)
        # Outputs (N, 1) less targets (N,) would be (N, N), without a word.
        return _like_targets(own)

    def own_loss(self) -> Criterion | None:
        own = super().own_loss()
        if own is None:
            return None
        return partial(_error, of=own)

    def _of_outputs(self, name: str, outputs: int) -> dict[str, Any]:
        if name in ("pearson", "spearman"):
            return {"num_outputs": outputs}
        return {}

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        shape = f"numbers, (N, {outputs})"
        if outputs == 1:
            return f"{shape} or (N,)"
        return shape

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        count = len(targets)
        shape = tuple(found.shape)
        if shape == (count, outputs):
            return None
        if shape == (count,) and outputs == 1:
            return None
        plural = ""
        if outputs > 1:
            plural = "s"
        return (
            f"the network returns {shape} for {count} inputs; the data has "
            f"{outputs} number{plural} for each, so it must return ({count}, {outputs})"
        )


def _refuse_too_large(targets: Tensor) -> None:
    too_large = ~targets.isfinite()
    if bool(too_large.any()):
        first = int(too_large.nonzero()[0][0])
        raise UserError(f"the target of example {first} is larger than float32 can hold")


def _refuse_all_the_same(targets: Tensor) -> None:
    first = targets[0]
    same = targets == first
    if not bool(same.all()):
        return
    values = first.reshape(-1).tolist()
    few = [f"{value:g}" for value in values[:3]]
    shown = ", ".join(few)
    raise UserError(f"all examples have one and the same target, {shown}")


def _own(name: str, options: MetricOptions) -> Metric:
    """A metric of `_OWN` at work."""
    key = options.key
    if options.args:
        given = ", ".join(map(repr, options.args))
        raise UserError(f"the metric '{key}' takes no arguments, and it has {given}")
    known, sums, final, width = _OWN[name]
    described = Described(key, known.better)
    return Metric(described, sums, final, width=width)


def _like_targets(metric: Metric) -> Metric:
    """The metric, of outputs in the shape of the targets."""
    make = metric.whole
    assert make is not None

    def whole() -> Whole:
        made = make()
        return _LikeTargets(made)

    return Metric(metric.described, whole=whole)


class _LikeTargets(Whole):
    """A metric that wants outputs in the shape of the targets."""

    def __init__(self, metric: Whole) -> None:
        self.metric = metric

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Whole.update`."""
        arranged = _like(outputs, targets)
        self.metric.update(arranged, targets)

    def value(self) -> Tensor:
        """See `Whole.value`."""
        return self.metric.value()


def _error(outputs: Tensor, targets: Tensor, of: Criterion) -> Tensor:
    arranged = _like(outputs, targets)
    return of(arranged, targets)
