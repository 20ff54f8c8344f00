"""Metrics: numbers of a network's quality on a split, accumulated over batches."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator
from torch import Tensor

from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line, shorten
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.options import Options

if TYPE_CHECKING:  # torchmetrics takes a second to import, which most trials need not pay
    import torchmetrics

Better = Literal["larger", "smaller"]


@dataclass(frozen=True)
class Described:
    """What is known of a metric before there is data: its name, its direction, and its range."""

    name: str
    better: Better
    bounded: bool = False
    """Whether it is in [0, 1]."""
    short: str = ""
    """What heads of tables call it."""

    @property
    def head(self) -> str:
        """What tables call it."""
        return self.short or self.name


@dataclass(frozen=True)
class Metric:
    """A metric at work: its description, and how it is taken.

    Most are sums over examples: `sums` gives (k,) of a batch, and `final` makes the value of their
    totals. Others are not sums of anything (an AUROC, a function of the user's): `whole` makes an
    accumulator for a split, which sees one batch after the other.
    """

    described: Described
    sums: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of outputs (N, …) and targets (N, …): (k,); `vmap` takes it."""
    final: Callable[[Sequence[float]], float] = lambda totals: totals[0]
    whole: Callable[[], Whole] | None = None
    width: int = 1
    """k."""
    stacked: Callable[[Tensor, Tensor], Tensor] | None = None
    """`sums` of outputs (K, N, …) of K networks and the same targets (N, …): (K, k), where that is
    faster than `vmap`."""

    @property
    def name(self) -> str:
        """Its name in a config."""
        return self.described.name


class Whole:
    """Accumulates one metric over the batches of a split."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Takes in a batch: outputs (N, …) and targets (N, …)."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """The value over all batches, a scalar."""
        raise NotImplementedError


class OfTorchmetrics(Whole):
    """A metric of torchmetrics."""

    def __init__(self, metric: torchmetrics.Metric) -> None:
        self.metric = metric

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Whole.update`."""
        metric = self.metric.to(outputs.device)
        # Some take views, and the outputs of one network of a pack are not contiguous.
        outputs = outputs.contiguous()
        targets = targets.contiguous()
        metric.update(outputs, targets)

    def value(self) -> Tensor:
        """See `Whole.value`."""
        found: Tensor = self.metric.compute()
        return found


OwnFunction = Callable[[Tensor, Tensor], float | Tensor]
"""A metric of the user's, of all outputs (N, …) and targets (N, …)."""


class OfFunction(Whole):
    """A function of all outputs and targets of a split."""

    def __init__(self, function: OwnFunction, name: str) -> None:
        self.function = function
        self.name = name
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Whole.update`."""
        self.outputs.append(outputs)
        self.targets.append(targets)

    def value(self) -> Tensor:
        """See `Whole.value`.

        Raises:
            UserError: if the function raises, or gives anything but one number.
        """
        outputs = torch.cat(self.outputs)
        targets = torch.cat(self.targets)
        try:
            given = self.function(outputs, targets)
        except OF_USERS_CODE as error:
            kind = type(error).__name__
            reason = first_line(error)
            raise UserError(f"the metric '{self.name}' raised {kind}: {reason}") from error
        try:
            found = torch.as_tensor(given)
        except (RuntimeError, TypeError, ValueError):
            kind = type(given).__name__
            raise UserError(
                f"the metric '{self.name}' gave {shorten(repr(given))} ({kind}); it must give one "
                "number"
            ) from None
        if found.numel() != 1:
            shape = tuple(found.shape)
            raise UserError(f"the metric '{self.name}' gave {shape} numbers; it must give one")
        found = found.to(outputs.device)
        return found.reshape(())


class Tally:
    """Accumulates the metrics of a task, of one network or of K that see the same examples."""

    def __init__(self, metrics: Sequence[Metric], members: int | None = None) -> None:
        """`members` is K; None: one network, and no leading dimension."""
        self.metrics = metrics
        self.members = members
        self.sums: list[list[Tensor]] = []
        self.wholes: list[list[Whole]] = []
        for metric in metrics:
            self.sums.append([])
            wholes = self._wholes(metric)
            self.wholes.append(wholes)

    def _wholes(self, metric: Metric) -> list[Whole]:
        """An accumulator for each network, where the metric is not a sum."""
        if metric.whole is None:
            return []
        count = self.members or 1
        return [metric.whole() for _ in range(count)]

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Takes in a batch: outputs (N, …), or (K, N, …) of K networks, and targets (N, …)."""
        of_members: Sequence[Tensor] = [outputs]
        if self.members is not None:
            of_members = outputs.unbind()
        of_metrics = zip(self.metrics, self.sums, self.wholes, strict=True)
        for metric, sums, wholes in of_metrics:
            if not wholes:
                of_batch = self._sums(metric, outputs, targets)
                sums.append(of_batch)
                continue
            for whole, own in zip(wholes, of_members, strict=True):
                whole.update(own, targets)

    def _sums(self, metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
        assert metric.sums is not None
        if self.members is None:
            return metric.sums(outputs, targets)
        if metric.stacked is not None:
            return metric.stacked(outputs, targets)
        sums_of_each = torch.func.vmap(metric.sums, in_dims=(0, None))
        return sums_of_each(outputs, targets)

    def state(self) -> Tensor:
        """All totals and values, (n,) or (K, n), float64: nothing of it waits for a GPU unless a
        metric does."""
        parts = []
        for sums, wholes in zip(self.sums, self.wholes, strict=True):
            if not wholes:
                totals = torch.stack(sums).double()
                parts.append(totals.sum(0))
                continue
            of_members = [whole.value().double() for whole in wholes]
            values = torch.stack(of_members)
            if self.members is not None:
                values = values.unsqueeze(-1)
            parts.append(values)
        return torch.cat(parts, -1)


class MetricOptions(Options):
    """A metric of a config: `name` of the task's, or `factory`, an import path, with `better`.

    What else is given are arguments: `{name: auroc, average: macro}`. `called` is the name in
    results where it is to be another, such as `{name: accuracy, top_k: 5, called: top5}`. A factory
    is a function of the outputs and targets of a split that returns a number, or a class of
    torchmetrics.
    """

    name: str | None = None
    factory: str | None = None
    better: Better | None = None
    called: str | None = Field(None, pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    args: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_arguments(cls, given: Any) -> Any:
        if isinstance(given, str):
            if ":" in given:
                return {"factory": given}
            return {"name": given}
        if not isinstance(given, Mapping):
            return given
        known = {}
        others = {}
        for key, value in given.items():
            if key in cls.model_fields:
                known[key] = value
            else:
                others[key] = value
        args = known.get("args", {})
        if others and isinstance(args, Mapping):
            known["args"] = {**args, **others}
        return known

    @model_validator(mode="after")
    def _one_source(self) -> MetricOptions:
        if (self.name is None) == (self.factory is None):
            raise ValueError("give either 'name' or 'factory', an import path")
        if self.factory is not None and self.better is None:
            raise ValueError("say whether larger or smaller is better: 'better: larger'")
        return self

    @field_validator("factory")
    @classmethod
    def _a_path(cls, path: str | None, _info: ValidationInfo) -> str | None:
        if path is None or ":" in path:
            return path
        raise ValueError("an import path has the form package.module:name")

    @property
    def key(self) -> str:
        """Its name in results."""
        if self.called:
            return self.called
        if self.name:
            return self.name
        _, _, function = str(self.factory).partition(":")
        _, _, leaf = function.rpartition(".")
        return leaf

    def of_factory(self, as_given: Callable[[Tensor], Tensor]) -> Metric:
        """The metric at work, where it comes from an import path.

        Args:
            as_given: makes of outputs as metrics see them what the network gave, which a function
                gets; a class of torchmetrics gets what other metrics see.

        Raises:
            UserError: if there is no such function.
        """
        made = import_by_path(str(self.factory), "metric")
        better = self.better or "larger"
        described = Described(self.key, better)
        args = dict(self.args)
        if inspect.isclass(made):
            built = _built(made, args, self.key)
            return _of_torchmetrics(described, built)

        def function(outputs: Tensor, targets: Tensor) -> Any:
            return made(as_given(outputs), targets, **args)

        return Metric(described, whole=lambda: OfFunction(function, self.key))


def _of_torchmetrics(described: Described, metric: torchmetrics.Metric) -> Metric:
    """The metric at work: a copy of `metric` accumulates each split."""

    def whole() -> Whole:
        copied = metric.clone()
        return OfTorchmetrics(copied)

    return Metric(described, whole=whole)


def _built(made: Callable[..., Any], args: Mapping[str, Any], name: str) -> torchmetrics.Metric:
    import torchmetrics

    try:
        with warnings.catch_warnings():
            # Several say that they keep all outputs of a split, which is small here.
            warnings.filterwarnings("ignore", "Metric `.*` will save all targets")
            built = made(**args)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"the metric '{name}' does not take these arguments: {reason}") from None
    if not isinstance(built, torchmetrics.Metric):
        kind = type(built).__name__
        raise UserError(f"the metric '{name}' is a {kind}; a class must be one of torchmetrics")
    # Of several processes each has all outputs already, or one alone measures.
    built.distributed_available_fn = _by_itself
    return built


def _by_itself() -> bool:
    return False


@dataclass(frozen=True)
class Known:
    """A metric that a task offers by name, taken by torchmetrics."""

    of_torchmetrics: str
    """The class, such as "classification.MulticlassF1Score"."""
    better: Better = "larger"
    bounded: bool = True
    defaults: Mapping[str, Any] | None = None

    def metric(self, options: MetricOptions, given: Mapping[str, Any]) -> Metric:
        """The metric at work; `given` are arguments that the task knows, such as the number of
        outputs.

        Raises:
            UserError: if it does not take what the config gives it.
        """
        import torchmetrics

        made: Any = torchmetrics
        path = self.of_torchmetrics.split(".")
        for part in path:
            made = getattr(made, part)
        defaults = self.defaults or {}
        args = {**defaults, **given, **options.args}
        name = options.key
        built = _built(made, args, name)
        described = Described(name, self.better, self.bounded)
        return _of_torchmetrics(described, built)


def ratio(totals: Sequence[float]) -> float:
    """The first total divided by the second; NaN of nothing."""
    total, count = totals
    if not count:
        return math.nan
    return total / count
