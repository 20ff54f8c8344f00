"""Classification: one class for each example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.tasks.active import ActiveTask, Criterion
from slimfront.trainables.tasks.base import TASKS, Encoded, Task
from slimfront.trainables.tasks.metrics import Described, Known, Metric, MetricOptions, ratio
from slimfront.trainables.tasks.targets import as_tensor, is_column, whole

_MOST_SHOWN = 6
ClassWeights = Literal["balanced"] | tuple[float, ...] | None

MULTICLASS = {
    "balanced_accuracy": Known("classification.MulticlassAccuracy", defaults={"average": "macro"}),
    "f1": Known("classification.MulticlassF1Score", defaults={"average": "macro"}),
    "precision": Known("classification.MulticlassPrecision", defaults={"average": "macro"}),
    "recall": Known("classification.MulticlassRecall", defaults={"average": "macro"}),
    "specificity": Known("classification.MulticlassSpecificity", defaults={"average": "macro"}),
    "auroc": Known("classification.MulticlassAUROC", defaults={"average": "macro"}),
    "average_precision": Known(
        "classification.MulticlassAveragePrecision", defaults={"average": "macro"}
    ),
    "cohen_kappa": Known("classification.MulticlassCohenKappa", bounded=False),
    "matthews": Known("classification.MulticlassMatthewsCorrCoef", bounded=False),
    "calibration_error": Known("classification.MulticlassCalibrationError", "smaller"),
    "miou": Known("classification.MulticlassJaccardIndex", defaults={"average": "macro"}),
}
"""Metrics of torchmetrics that take logits (N, classes, …) and classes (N, …)."""


def count_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """How many of the outputs (N, classes) are largest at the target (N,), and N: (2,), int64."""
    chosen = outputs.argmax(1)
    is_right = chosen == targets
    right = is_right.sum()
    examples = targets.numel()
    count = torch.full_like(right, examples)
    return torch.stack([right, count])


def count_right_of_each(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same of K networks: outputs (K, N, classes), (K, 2)."""
    _, chosen = outputs.max(2)
    is_right = chosen == targets
    right = is_right.sum(1)
    examples = targets.numel()
    count = torch.full_like(right, examples)
    return torch.stack([right, count], 1)


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy of logits (N, classes) with one class for each example; its quality is
    accuracy.

    `class_weights` are a number for each class, or `balanced`: inversely to how many training
    examples a class has; they are scaled so that the mean over the training examples is 1.
    `classes` is how many there are, where the data do not have an example of each.
    """

    name: Literal["classification"] = "classification"
    class_weights: ClassWeights = None
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    classes: int | None = Field(None, ge=2)

    KNOWN: ClassVar[Mapping[str, Known]] = MULTICLASS
    DEFAULT: ClassVar[tuple[str, ...]] = ("accuracy",)
    LOSSES: ClassVar[tuple[str, ...]] = ("cross_entropy",)

    def describe(self, name: str) -> Described:
        if name == "accuracy":
            return Described(name, "larger", bounded=True)
        return super().describe(name)

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        classes = self.classes or outputs
        return encode_classes(given, self.name, names, classes)

    def strata(self, targets: Tensor) -> Tensor | None:
        return targets

    def stratum(self, number: int, names: Sequence[str] = ()) -> str:
        if names:
            return f"class '{names[number]}'"
        return f"class {number}"

    def warnings(self, train: Tensor, others: Mapping[str, Tensor]) -> Iterator[str]:
        known = set(train.unique().tolist())
        for name, targets in others.items():
            found = set(targets.unique().tolist())
            unknown = sorted(found - known)
            if not unknown:
                continue
            shown = first_few(unknown, 10)
            yield (
                f"the {name} split has classes that no training example has ({shown}): no "
                "network can learn them"
            )

    def attach(self, targets: Tensor, encoded: Encoded) -> ActiveTask:
        active = super().attach(targets, encoded)
        weighted = self.class_weights is not None
        own_loss = not isinstance(self.loss, str)
        if weighted or own_loss or self.label_smoothing:
            return active
        return replace(active, stacked=cross_entropies)

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        weights = class_weights(self.class_weights, targets, encoded)
        return partial(
            weighted_cross_entropy, weights=weights, label_smoothing=self.label_smoothing
        )

    def distillation(
        self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        of_each = soft_cross_entropy(outputs, teacher, temperature)
        return of_each.mean()

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        name = str(options.name)
        plain = not options.args
        if name == "accuracy" and plain:
            described = Described(options.key, "larger", bounded=True)
            return Metric(described, count_right, ratio, width=2, stacked=count_right_of_each)
        known = _TOP_K
        if name != "accuracy":
            known = self.KNOWN[name]
        return known.metric(options, {"num_classes": outputs})

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        return f"logits, (N, {outputs})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        count = len(targets)
        shape = tuple(found.shape)
        if len(shape) != 2 or shape[0] != count:
            return (
                f"the network returns {shape} ({found.dtype}) for {count} "
                f"inputs; it must return logits, ({count}, {outputs})"
            )
        return too_few_logits(found, outputs)


_TOP_K = Known("classification.MulticlassAccuracy", defaults={"average": "micro"})


def too_few_logits(found: Tensor, outputs: int) -> str | None:
    """What is wrong with logits (N, classes, …) that have no place for each class."""
    logits = found.shape[1]
    if logits >= outputs:
        return None
    return (
        f"the network gives {logits} logits, and the data set has {outputs} classes; give "
        "it an output each"
    )


def weighted_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore: int = -100,
    places: float | None = None,
) -> Tensor:
    """The mean cross-entropy of logits (N, classes, …) with classes (N, …); each example counts by
    the weight (classes,) of its class.

    Where some places do not count, the sum is divided by N times `places`, the number that an
    example of the training split has on average, and not by the number in this batch: so that the
    mean over parts of a batch is that over the batch.
    """
    if weights is None and places is None:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    if weights is not None:
        weights = weights.to(outputs.device)
    each = nn.functional.cross_entropy(
        outputs,
        targets,
        weights,
        ignore_index=ignore,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if places is None:
        return each.mean()
    usual_count = len(targets) * places
    return each.sum() / usual_count


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each of K networks: logits (K, B, classes), classes (K, B); (K,).

    Outside of vmap, which takes cross-entropy apart, and with the classes before the batch, which
    is four times as fast.
    """
    logits = outputs.transpose(1, 2)
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    return each.mean(1)


def class_weights(chosen: ClassWeights, targets: Tensor, encoded: Encoded) -> Tensor | None:
    """The weight of each class, (classes,), scaled so that the mean over the training targets is 1;
    None: all alike."""
    if chosen is None:
        return None
    classes = encoded.outputs
    is_class = targets >= 0
    known = targets[is_class].flatten()
    counts = known.bincount(minlength=classes)
    counts = counts[:classes].double()
    if isinstance(chosen, str):
        occurs = counts > 0
        inverse = 1 / counts.clamp_min(1)
        weights = torch.where(occurs, inverse, 0.0)
    else:
        weights = _checked_weights(chosen, classes)
    weighted = weights * counts
    mean = weighted.sum() / counts.sum()
    if not mean > 0:
        raise UserError("task.class_weights are 0 for all classes of the training examples")
    scaled = weights / mean
    return scaled.float()


def _checked_weights(chosen: tuple[float, ...], classes: int) -> Tensor:
    count = len(chosen)
    weights = torch.tensor(chosen, dtype=torch.float64)
    negative = weights < 0
    if count != classes or bool(negative.any()):
        raise UserError(
            f"task.class_weights has {count} numbers, and there are {classes} "
            "classes; give each a number of 0 or more"
        )
    return weights


def encode_classes(
    given: Any, task: str, names: Sequence[str] = (), classes: int | None = None
) -> Encoded:
    """Classes as they came, as numbers from 0.

    Names, numbers that begin elsewhere than at 0, and any two numbers are mapped, and what each
    output stands for is kept. Of rows with a 1 for the class and 0 for all others, the place of the
    1 is taken.

    Args:
        given: (N,) or (N, 1) whole numbers, whole floats, booleans or strings, or (N, classes) with
            one 1 in each row.
        names: of the classes from 0, where the data set has them.
        classes: how many there are, where it is known.

    Raises:
        UserError: if they are none of that, or leave out a number between the others.
    """
    strings = _strings(given)
    if strings is not None:
        return _of_names(strings, classes)
    numbers = as_tensor(given, task)
    targets = _whole(numbers, task)
    known = classes or len(names)
    if known:
        return _of_known_number(targets, names, known)
    return _renumbered(targets)


def _of_names(strings: list[str], classes: int | None) -> Encoded:
    """Names as numbers, in the order of the alphabet."""
    distinct = set(strings)
    names = tuple(sorted(distinct))
    places = {}
    for place, name in enumerate(names):
        places[name] = place
    numbers = [places[name] for name in strings]
    targets = torch.tensor(numbers, dtype=torch.int64)
    return _checked(targets, names, classes)


def _of_known_number(targets: Tensor, names: Sequence[str], count: int) -> Encoded:
    """Numbers in 0 … count − 1 as they are."""
    numbers = targets.unique().tolist()
    if len(numbers) < 2:
        raise _one_class_only()
    least = numbers[0]
    largest = numbers[-1]
    if least < 0 or largest >= count:
        raise UserError(
            f"the data has targets from {least} to {largest}, and {count} classes; they are "
            f"numbers in 0 … {count - 1}"
        )
    if len(names) != count:
        return Encoded(targets, count)
    return Encoded(targets, count, tuple(names))


def _renumbered(targets: Tensor) -> Encoded:
    """Numbers from 0, where they began elsewhere, or are any two."""
    values = targets.unique()
    numbers = values.tolist()
    least = numbers[0]
    largest = numbers[-1]
    span = largest - least + 1
    together = len(numbers) == span
    if least == 0 and together:
        return _checked(targets, (), None)
    if not together and len(numbers) != 2:
        known = set(numbers)
        missing = next(n for n in range(least, largest) if n not in known)
        raise UserError(
            f"the data has classes from {least} to {largest}, and no example of {missing}; number "
            f"them without a gap, or set task.classes to {largest + 1} for an output each; where "
            "they are amounts, set task: regression"
        )
    names = tuple(map(str, numbers))
    places = torch.searchsorted(values, targets)
    return _checked(places, names, None)


def _checked(targets: Tensor, names: tuple[str, ...], classes: int | None) -> Encoded:
    numbers = targets.unique().tolist()
    count = len(names)
    if not names:
        largest = numbers[-1]
        count = largest + 1
    if classes is not None and classes != count:
        shown = first_few(names, _MOST_SHOWN)
        raise UserError(f"task.classes is {classes}, and the data has {count} ({shown})")
    if count < 2 or len(numbers) < 2:
        raise _one_class_only()
    return Encoded(targets, count, names)


def _one_class_only() -> UserError:
    return UserError("all examples have one and the same class; there must be two or more")


def _strings(given: Any) -> list[str] | None:
    """The targets, if they are strings.

    Raises:
        UserError: if only some are.
    """
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    is_table_column = all(map(_is_cell, values))
    if is_table_column:
        values = [value for (value,) in values]
    strings = [isinstance(value, str) for value in values]
    if not any(strings):
        return None
    if all(strings):
        return values
    first = strings.index(False)
    other = values[first]
    raise UserError(
        f"the target of example {first} is {other!r}, and others are names; leave it "
        "out, or give it a name"
    )


def _is_cell(value: object) -> bool:
    """Whether it is a row of one column."""
    return isinstance(value, list) and len(value) == 1


def is_one_hot(targets: Tensor) -> bool:
    """Whether targets (N, classes, …) are 1 in one place of the second axis, and 0 elsewhere."""
    if targets.dim() < 2 or targets.is_complex():
        return False
    if targets.shape[1] < 2:
        return False
    known = (targets == 0) | (targets == 1)
    if not bool(known.all()):
        return False
    ones = targets.long().sum(1)
    one_each = ones == 1
    return bool(one_each.all())


def _whole(targets: Tensor, task: str) -> Tensor:
    if is_column(targets):
        targets = targets.squeeze(1)
    if is_one_hot(targets):
        targets = targets.long().argmax(1)
    if targets.dim() != 1 or targets.is_complex():
        shape = tuple(targets.shape)
        advice = ""
        if targets.dim() == 2:
            advice = "; for several classes an example, set task: multilabel"
        raise UserError(
            f"the data has targets of shape {shape} and type {targets.dtype}; the "
            f"task {task} takes one whole number for each example, (N,){advice}"
        )
    if not whole(targets):
        broken = targets != targets.round()
        first = int(broken.nonzero()[0])
        value = float(targets[first])
        raise UserError(
            f"the target of example {first} is {value:g}; the task {task} takes "
            "whole numbers or names; for numbers, set task: regression"
        )
    return targets.long()


def soft_cross_entropy(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(outputs / T)), Hinton et al. 2015, arXiv 1503.02531,
    section 2: of logits (N, classes, …) each, to (N, …)."""
    wanted = torch.log_softmax(teacher / temperature, 1)
    made = torch.log_softmax(outputs / temperature, 1)
    difference = wanted - made
    probabilities = wanted.exp()
    entries = probabilities * difference
    divergence = entries.sum(1)
    return divergence * temperature**2
