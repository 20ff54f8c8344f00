"""What every task offers: what a network is trained for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, JsonValue, field_validator
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.gpu import to_device
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.options import Options, Registry, suggest
from slimfront.trainables.precision import to_float32
from slimfront.trainables.tasks.metrics import Described, Known, Metric, MetricOptions, Tally

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Outputs (N, …), float32, and targets (N, …) to a mean loss, a scalar."""


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
        key = f"val_{self.quality.name}"
        now, then = scores[key], before[key]
        if self.quality.better == "larger":
            return now >= then - abs(then) / 2
        return now <= then + abs(then)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of outputs (N, …) with targets (N, …), a scalar; computed in float32."""
        outputs = self.options.arrange(to_float32(outputs))
        return self.criterion(outputs, self._scaled(targets))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same of K networks: outputs (K, B, …) with targets (K, B, …), (K,)."""
        outputs = self.options.arrange(to_float32(outputs))
        targets = self._scaled(targets)
        if self.stacked is not None:
            return self.stacked(outputs, targets)
        return torch.func.vmap(self.criterion)(outputs, targets)

    def _scaled(self, targets: Tensor) -> Tensor:
        if self.offset is None or self.scale is None:
            return targets
        offset, scale = self.offset.to(targets.device), self.scale.to(targets.device)
        return (targets - offset) / scale

    def in_unit(self, outputs: Tensor) -> Tensor:
        """Outputs (…, outputs) in the unit of the targets."""
        if self.offset is None or self.scale is None:
            return outputs
        return outputs * self.scale.to(outputs.device) + self.offset.to(outputs.device)

    def tally(self, members: int | None = None) -> Tally:
        """An accumulator of all metrics, for one network, or for K that see the same examples."""
        return Tally(self.metrics, members)

    def count(self, tally: Tally, outputs: Tensor, targets: Tensor) -> None:
        """Has `tally` take in what networks made of a batch: outputs (N, …) or (K, N, …), targets
        (N, …)."""
        seen = self.options.arrange(self.in_unit(to_float32(outputs)))
        tally.update(seen, to_device(targets, outputs.device))

    @torch.no_grad()
    def state(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int | None = None,
        prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    ) -> Tensor:
        """What `scores` makes the metrics of, (n,), float64, of a network in evaluation mode.

        Nothing here waits for a GPU, unless a metric does.

        Args:
            inputs: (N, …), as they are stored.
            targets: (N, …).
            batch_size: 4096 if None, or what makes batches of 64 MiB of float32 if that is less.
            prepare: makes what the network sees of a batch of inputs: `Dataset.prepare`.
        """
        size = batch_size or _at_once(inputs)
        tally = self.tally()
        with _evaluating(network):
            for some, wanted in zip(inputs.split(size), targets.split(size), strict=True):
                self.count(tally, network(prepare(some)), wanted)
        return tally.state()

    @torch.no_grad()
    def outputs_of(
        self,
        network: nn.Module,
        inputs: Tensor,
        prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    ) -> Tensor:
        """What a network makes of all inputs, in evaluation mode, (N, …), float32; arguments as for
        `state`."""
        with _evaluating(network):
            made = [to_float32(network(prepare(some))) for some in inputs.split(_at_once(inputs))]
        return torch.cat(made)

    def state_of_shipped(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As `state`, of what a shipped network made of all inputs: (N, …), in the unit of the
        targets."""
        tally = self.tally()
        tally.update(self.options.arrange(to_float32(outputs)), targets)
        return tally.state()

    def scores(self, state: Sequence[float], split: str = "val") -> dict[str, float]:
        """The metrics by name, such as `val_accuracy`, of what `state` gave."""
        found, begun = {}, 0
        for metric in self.metrics:
            width = metric.width
            found[f"{split}_{metric.name}"] = metric.final(state[begun : begun + width])
            begun += width
        return found

    def evaluate(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        split: str = "val",
        prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    ) -> dict[str, float]:
        """The metrics of a network on a split; arguments as for `state`."""
        return self.scores(self.state(network, inputs, targets, prepare=prepare).tolist(), split)

    def evaluate_shipped(
        self,
        network: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        split: str = "val",
        prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    ) -> dict[str, float]:
        """The same of a network that gives outputs in the unit of the targets."""
        outputs = self.outputs_of(network, inputs, prepare)
        return self.scores(self.state_of_shipped(outputs, targets.cpu()).tolist(), split)


def _moved(criterion: Criterion, device: torch.device) -> Criterion:
    """The criterion with the tensors that it was made with on `device`."""
    if not isinstance(criterion, partial):
        return criterion
    there = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in criterion.keywords.items()
    }
    return partial(criterion.func, *criterion.args, **there)


def _at_once(inputs: Tensor) -> int:
    """How many inputs (N, …) are taken in a batch: 4096, or what makes 64 MiB of float32 if that is
    less."""
    return max(1, min(4096, 2**24 // max(inputs[0].numel(), 1)))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


class Task(Options):
    """Options of a task: what a network is trained for. A new one is one file with a subclass.

    `metrics` are taken of every network, by name or by import path; the first is the quality, by
    which networks are judged. `loss` is one of the task's, or a function of the user's (outputs,
    targets) that returns a mean. `output` says which of several outputs of a network counts: a key
    of a mapping, or a place in a tuple.
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
        for metric in metrics:
            if metric.name is not None and metric.name not in cls.metric_names():
                raise ValueError(
                    f"unknown metric '{metric.name}'; {suggest(metric.name, cls.metric_names())}"
                )
        names = [metric.key for metric in metrics]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two metrics are called '{twice}'; give one another name by 'called'")
        return metrics

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str | FunctionOptions) -> str | FunctionOptions:
        if isinstance(loss, str) and loss and loss not in cls.LOSSES:
            raise ValueError(
                f"unknown loss '{loss}', and one of your own is {{factory: IMPORT PATH}}; "
                f"{suggest(loss, cls.LOSSES)}"
            )
        return loss

    @classmethod
    def metric_names(cls) -> tuple[str, ...]:
        """All metrics by name."""
        return tuple(dict.fromkeys((*cls.DEFAULT, *cls.KNOWN)))

    def chosen_metrics(self) -> tuple[MetricOptions, ...]:
        """The metrics that are taken, the quality first."""
        return self.metrics or tuple(MetricOptions(name=name) for name in self.DEFAULT)

    def described(self) -> tuple[Described, ...]:
        """The metrics that are taken, before there is data."""
        found = []
        for options in self.chosen_metrics():
            if options.factory is not None:
                found.append(Described(options.key, options.better or "larger"))
            else:
                known = self.describe(str(options.name))
                better = options.better or known.better
                short = ""
                if options.called is None:
                    short = known.short
                found.append(Described(options.key, better, known.bounded, short))
        return tuple(found)

    def describe(self, name: str) -> Described:
        """What is known of the metric called `name`."""
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
            f"the task {self.name} does not take"
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
            self,
            encoded.outputs,
            self.own_loss() or self.criterion(targets, encoded),
            self.active_metrics(encoded.outputs),
            encoded.names,
        )

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        """The loss of the task, as its options say; arguments as for `attach`."""
        raise NotImplementedError(f"the task '{self.name}' does not say what its loss is")

    def resolve(self) -> Task:
        """The task itself; of one by import path, what stands there."""
        return self

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        """One of the task's metrics at work."""
        return self.KNOWN[str(options.name)].metric(options, {})

    def active_metrics(self, outputs: int) -> tuple[Metric, ...]:
        """All metrics that are taken, at work."""
        return tuple(
            self.metric(options, outputs) if options.factory is None else options.of_factory()
            for options in self.chosen_metrics()
        )

    def own_loss(self) -> Criterion | None:
        """The user's loss, if the config names one."""
        if not isinstance(self.loss, FunctionOptions):
            return None
        function, args = import_by_path(self.loss.factory, "loss"), copy.deepcopy(self.loss.args)
        path = self.loss.factory

        def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
            try:
                found: Tensor = function(outputs, targets, **args)
            except Exception as error:
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
        if not isinstance(found, Tensor):
            raise UserError(
                f"the network returns a {type(found).__name__}; it must return one tensor, "
                f"{self.shape_of_outputs(targets, outputs)}, or task.output must say which of its "
                "outputs counts"
            )
        problem = self.wrong_outputs(found, targets, outputs)
        if problem is not None or not found.is_floating_point():
            raise UserError(
                problem
                or f"the network returns {tuple(found.shape)} ({found.dtype}) for {len(targets)} "
                f"inputs; it must return {self.shape_of_outputs(targets, outputs)}"
            )

    def arrange(self, outputs: Tensor) -> Tensor:
        """Outputs (…, N, …) as the loss and the metrics take them, with the classes before the
        places."""
        return outputs

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        """What the outputs of a network look like, in words."""
        return f"numbers, (N, {outputs})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        """What is wrong with outputs, as a sentence; None if nothing is."""
        return None


TASKS: Registry[Task] = Registry("task")


def as_tensor(given: Any, task: str) -> Tensor:
    """Targets (N, …) as a tensor on the CPU.

    Raises:
        UserError: if they are not numbers, or there are none.
    """
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    _refuse_other_than_numbers(given, task)
    try:
        with warnings.catch_warnings():
            # Nothing writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            found = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = getattr(given, "dtype", type(given).__name__)
        raise UserError(f"targets of the task {task} are numbers, and these are {kind}") from None
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):
        found = found.long()  # torch can do little with these
    if not found.dim() or not len(found):
        raise UserError("there are no targets: the data has no examples")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        first = int((~found.isfinite()).flatten(1 if found.dim() > 1 else 0).nonzero()[0][0])
        raise UserError(f"the target of example {first} is NaN or infinite; leave it out")
    return found


def _refuse_other_than_numbers(given: Any, task: str) -> None:
    """Raises UserError for a list, or an array of objects, with something else among its numbers,
    and says where."""
    kind = getattr(given, "dtype", None)
    if not (isinstance(given, list | tuple) or (kind is not None and str(kind) == "object")):
        return
    for place, one in enumerate(given):
        if one is None or isinstance(one, str):
            shown = "missing"
            if one is not None:
                shown = f"'{one}'"
            raise UserError(
                f"the target of example {place} is {shown}, and the task {task} takes numbers here"
            )


def whole(targets: Tensor) -> bool:
    """Whether targets are whole numbers, of whatever type."""
    if targets.is_complex():
        return False
    return not targets.is_floating_point() or torch.equal(targets, targets.round())
