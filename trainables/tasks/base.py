"""What every task offers, and what a user writes: what a network is trained for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, JsonValue, field_validator
from torch import Tensor

from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.options import Options, Registry, suggest
from slimfront.trainables.tasks.active import ActiveTask, Criterion
from slimfront.trainables.tasks.metrics import Described, Known, Metric, MetricOptions


class FunctionOptions(Options):
    """A function of the user's: what the callable at the import path `factory` computes, with the
    keyword arguments `args`."""

    factory: str
    args: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Targets as a task trains on them."""

    targets: Tensor
    """(N, …)."""
    outputs: int
    """How many outputs the head of a network needs for them."""
    names: tuple[str, ...] = ()
    """What each output stands for, where the targets that came were something else."""


class Task(Options):
    """Options of a task: what a network is trained for. A new one is one file with a subclass.

    `metrics` are taken of every network, by name or by import path; the first is the quality, by
    which networks are judged. `loss` is one of the task's, or a function of the user's (outputs,
    targets) that returns a mean. `output` says which of several outputs of a network counts: a key
    of a mapping, or a place in a tuple.

    A class whose outputs and targets look like those of a task says so by `LIKE`, the name of that
    task, and has its metrics by name: `LIKE = "classification"` for logits (N, classes) and classes
    (N,), `LIKE = "regression"` for numbers.
    """

    name: str = "own"
    metrics: tuple[MetricOptions, ...] = ()
    loss: str | FunctionOptions = ""
    output: str | int | None = None

    KNOWN: ClassVar[Mapping[str, Known]] = {}
    """Metrics of torchmetrics, by name."""
    DEFAULT: ClassVar[tuple[str, ...]] = ()
    """The metrics where a config names none."""
    LOSSES: ClassVar[tuple[str, ...]] = ()
    """The losses by name, the default first."""
    LIKE: ClassVar[str] = ""
    """The task whose metrics are known here too; none if empty."""

    def __hash__(self) -> int:
        # Arguments of metrics have no hash. What compares equal must only hash alike.
        return hash((type(self), self.name, self.output))

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_or_more(cls, given: Any) -> Any:
        if isinstance(given, str | Mapping):
            return (given,)
        return given

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[MetricOptions, ...]) -> tuple[MetricOptions, ...]:
        cls.check_metrics(metrics)
        names = [metric.key for metric in metrics]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two metrics are called '{name}'; give one another name by 'called'"
                )
        return metrics

    @classmethod
    def check_metrics(cls, metrics: Sequence[MetricOptions]) -> None:
        """Raises ValueError for a metric by a name that the task does not know."""
        known = cls.metric_names()
        for name in (metric.name for metric in metrics):
            if name is None or name in known:
                continue
            if not known:
                raise ValueError(
                    f"the metric '{name}' is another task's, and {cls.__name__} has none by name; "
                    "set LIKE of the class to the name of a task with the same outputs and "
                    "targets, or give {factory: IMPORT PATH, better: larger or smaller}"
                )
            raise ValueError(f"unknown metric '{name}'; {suggest(name, known)}")
        for metric in metrics:
            if metric.name is None or metric.better is None:
                continue
            better = cls.model_construct().describe(metric.name).better
            if metric.better != better:
                raise ValueError(
                    f"the metric '{metric.name}' is better when {better}; leave out 'better', "
                    "which is for metrics by 'factory'"
                )

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str | FunctionOptions) -> str | FunctionOptions:
        cls.check_loss(loss)
        return loss

    @classmethod
    def check_loss(cls, loss: str | FunctionOptions) -> None:
        """Raises ValueError for a loss by a name that the task does not know."""
        if not isinstance(loss, str) or not loss:
            return
        if loss not in cls.LOSSES:
            hint = suggest(loss, cls.LOSSES)
            raise ValueError(
                f"unknown loss '{loss}', and one of your own is {{factory: IMPORT PATH}}; {hint}"
            )

    @classmethod
    def metric_names(cls) -> tuple[str, ...]:
        """All metrics by name."""
        names = [*cls.DEFAULT, *cls.KNOWN]
        if cls.LIKE:
            alike = TASKS.find(cls.LIKE)
            names += alike.metric_names()
        distinct = dict.fromkeys(names)
        return tuple(distinct)

    def _alike(self, name: str) -> Task:
        """The task that knows a metric of this name: itself, or the one of `LIKE`."""
        if not self.LIKE or name in self.KNOWN:
            return self
        return TASKS.find(self.LIKE)()

    def unsaid_of_weights(self) -> str | None:
        """What a config must say beside `model.weights`, and does not; None: nothing."""
        return None

    def distillation(
        self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        """How far outputs (N, …) are from a teacher's (N, …), a mean over the batch, as `arrange`
        gives both: the mean squared difference, or what the task of `LIKE` says."""
        if self.LIKE:
            alike = TASKS.find(self.LIKE)()
            return alike.distillation(outputs, teacher, targets, temperature)
        return torch.nn.functional.mse_loss(outputs, teacher)

    def chosen_metrics(self) -> tuple[MetricOptions, ...]:
        """The metrics that are taken, the quality first."""
        if self.metrics:
            return self.metrics
        return tuple(MetricOptions(name=name) for name in self.DEFAULT)

    def described(self) -> tuple[Described, ...]:
        """The metrics that are taken, before there is data."""
        found = []
        for options in self.chosen_metrics():
            if options.factory is not None:
                better = options.better or "larger"
                found.append(Described(options.key, better))
                continue
            known = self.describe(str(options.name))
            short = ""
            if options.called is None:
                short = known.short
            found.append(Described(options.key, known.better, known.bounded, short))
        return tuple(found)

    def describe(self, name: str) -> Described:
        """What is known of the metric called `name`."""
        alike = self._alike(name)
        if alike is not self:
            return alike.describe(name)
        known = self.KNOWN[name]
        return Described(name, known.better, known.bounded)

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        """Targets as they came, as the task trains on them.

        Args:
            given: (N, …), a tensor, an array or a list.
            names: what each number stands for, where the data set says so.
            outputs: how many a network needs, where the data set says so.

        Raises:
            UserError: if they are not targets of this task; the message says what would be right.
        """
        raise NotImplementedError(f"the task '{self.name}' does not say what its targets are")

    def wrong_targets(self, targets: Tensor) -> UserError:
        """The error for targets of another form than the task takes."""
        return UserError(
            f"the data has targets of shape {tuple(targets.shape)} and type {targets.dtype}, which "
            f"the task {self.name} does not take; flatten those of each example, or have a task of "
            "your own by task.factory"
        )

    def strata(self, targets: Tensor) -> Tensor | None:
        """(N,) whole numbers whose shares are to be equal in all splits; None: examples are drawn
        at random."""
        return None

    def stratum(self, number: int, names: Sequence[str] = ()) -> str:
        """What one of the numbers that `strata` gives is called in messages."""
        return f"stratum {number}"

    def warnings(self, train: Tensor, others: Mapping[str, Tensor]) -> Iterator[str]:
        """What is odd about the targets of the training split beside those of the others, by their
        names: a sentence each."""
        yield from ()

    def attach(self, targets: Tensor, encoded: Encoded) -> ActiveTask:
        """The task at work.

        Args:
            targets: those of the training split, (N, …).
            encoded: all of them; their number of outputs and names count.

        Raises:
            UserError: if an option does not fit these targets.
        """
        return ActiveTask(
            options=self,
            outputs=encoded.outputs,
            criterion=self.own_loss() or self.criterion(targets, encoded),
            metrics=self.active_metrics(encoded.outputs),
            names=encoded.names,
        )

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        """The loss of the task, as its options say; arguments as for `attach`."""
        raise NotImplementedError(f"the task '{self.name}' does not say what its loss is")

    def resolve(self) -> Task:
        """The task itself; of one by import path, what stands there."""
        return self

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        """One of the task's metrics at work."""
        name = str(options.name)
        alike = self._alike(name)
        if alike is not self:
            return alike.metric(options, outputs)
        known = self.KNOWN[name]
        return known.metric(options, {})

    def active_metrics(self, outputs: int) -> tuple[Metric, ...]:
        """All metrics that are taken, at work."""
        found = []
        for options in self.chosen_metrics():
            if options.factory is None:
                found.append(self.metric(options, outputs))
            else:
                found.append(self.own_metric(options))
        return tuple(found)

    def own_metric(self, options: MetricOptions) -> Metric:
        """A metric of the user's at work."""
        return options.of_factory(self.as_given)

    def own_loss(self) -> Criterion | None:
        """The user's loss, if the config names one."""
        if not isinstance(self.loss, FunctionOptions):
            return None
        function = import_by_path(self.loss.factory, "loss")
        args = copy.deepcopy(self.loss.args)
        path = self.loss.factory

        def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
            try:
                found: Tensor = function(self.as_given(outputs), targets, **args)
            except OF_USERS_CODE as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UserError(
                    f"the loss '{path}' raised {type(error).__name__}: {first_line(error)}"
                ) from error
            if not isinstance(found, Tensor) or found.dim() > 1:
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise UserError(
                    f"the loss '{path}' gave {what}; it must give a tensor, one number or one for "
                    "each example"
                )
            return found.mean()

        return criterion

    def check_outputs(self, found: object, targets: Tensor, outputs: int) -> None:
        """Refuses what a network made of as many inputs as there are `targets` (N, …).

        Raises:
            UserError: if it is not what the task takes; the message says what would be right.
        """
        if found is None:
            raise UserError("the network returns None; its forward must return its outputs")
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            wanted = self.shape_of_outputs(targets, outputs)
            raise UserError(
                f"the network returns a {kind}; it must return one tensor, {wanted}, or "
                "task.output must say which of its outputs counts; where several count, put them "
                "together along an axis (torch.cat) and take them apart in the loss"
            )
        problem = self.wrong_outputs(found, targets, outputs)
        if problem is None and found.is_floating_point():
            return
        if not problem:
            shape = tuple(found.shape)
            wanted = self.shape_of_outputs(targets, outputs)
            problem = (
                f"the network returns {shape} ({found.dtype}) for {len(targets)} inputs; it must "
                f"return {wanted}"
            )
        raise UserError(problem)

    def arrange(self, outputs: Tensor) -> Tensor:
        """Outputs (…, N, …) as the loss and the metrics take them, with the classes before the
        places."""
        return outputs

    def as_given(self, arranged: Tensor) -> Tensor:
        """What `arrange` made, as the network gave it: functions of the user's see that."""
        return arranged

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        """What the outputs of a network look like, in words."""
        return f"numbers, (N, {outputs})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        """What is wrong with outputs, as a sentence; None if nothing is."""
        return None

    def unused_outputs(self, found: Tensor, outputs: int) -> str | None:
        """Which outputs stand for nothing in the data, as a sentence; None if none do."""
        return None


TASKS: Registry[Task] = Registry("task")
