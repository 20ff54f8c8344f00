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
from slimfront.trainables.tasks.classes import encode_classes
from slimfront.trainables.tasks.metrics import Described, Known, Metric, MetricOptions, ratio

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

    def unused_outputs(self, found: Tensor, outputs: int) -> str | None:
        return too_many_logits(found, outputs)


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


def too_many_logits(found: Tensor, outputs: int) -> str | None:
    """What is unusual about logits (N, classes, …) of which some stand for no class."""
    logits = found.shape[1]
    if logits <= outputs:
        return None
    return (
        f"the network gives {logits} logits, and the data set has {outputs} classes: no example is "
        "of the others; if there are more classes than the data show, set task.classes, and else "
        "give the network an output for each class"
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
