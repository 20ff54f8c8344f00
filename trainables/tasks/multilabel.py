"""Multi-label classification: any number of classes for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks.active import Criterion
from slimfront.trainables.tasks.base import TASKS, Encoded, Task
from slimfront.trainables.tasks.metrics import Known, Metric, MetricOptions, Whole
from slimfront.trainables.tasks.targets import as_tensor


@TASKS.register("multilabel")
class MultiLabel(Task):
    """Targets (N, classes) of 0 and 1, binary cross-entropy with logits of that shape; its quality
    is the mean F1 of the classes.

    With `class_weights: balanced` the examples that have a class weigh as much as all that do not.
    """

    name: Literal["multilabel"] = "multilabel"
    class_weights: Literal["balanced"] | None = None

    KNOWN: ClassVar[Mapping[str, Known]] = {
        "f1": Known("classification.MultilabelF1Score"),
        "accuracy": Known("classification.MultilabelAccuracy"),
        "exact_match": Known("classification.MultilabelExactMatch"),
        "auroc": Known("classification.MultilabelAUROC"),
        "average_precision": Known("classification.MultilabelAveragePrecision"),
        "precision": Known("classification.MultilabelPrecision"),
        "recall": Known("classification.MultilabelRecall"),
        "hamming_distance": Known("classification.MultilabelHammingDistance", "smaller"),
        "miou": Known("classification.MultilabelJaccardIndex"),
    }
    DEFAULT: ClassVar[tuple[str, ...]] = ("f1",)
    LOSSES: ClassVar[tuple[str, ...]] = ("binary_cross_entropy",)

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        targets = as_tensor(given, self.name)
        if targets.dim() != 2 or targets.is_complex():
            shape = tuple(targets.shape)
            raise UserError(
                f"the data has targets of shape {shape}; the task multilabel takes "
                "a 0 or 1 for each class of each example, (N, classes)"
            )
        targets = targets.float()
        signs = (targets == -1) | (targets == 1)
        if bool(signs.all()):
            targets = (targets + 1) / 2  # −1 stands for no
        wrong = (targets != 0) & (targets != 1)
        if bool(wrong.any()):
            first = wrong.nonzero()[0]
            row, column = first.tolist()
            value = float(targets[row, column])
            raise UserError(
                f"the target of example {row} has {value:g} at class "
                f"{column}; the task multilabel takes 0 and 1"
            )
        classes = targets.shape[1]
        if classes < 1:
            raise UserError("the data has targets without a class")
        return Encoded(targets, classes, tuple(names))

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        weights = None
        if self.class_weights == "balanced":
            having = targets.sum(0)
            others = len(targets) - having
            weights = others / having.clamp_min(1)
        return partial(_binary_cross_entropy, weights=weights)

    def distillation(
        self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        """T² · the binary cross-entropy of each label with the teacher's probability."""
        wanted = torch.sigmoid(teacher / temperature)
        made = outputs / temperature
        loss = torch.nn.functional.binary_cross_entropy_with_logits(made, wanted)
        return loss * temperature**2

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        name = str(options.name)
        known = self.KNOWN[name]
        metric = known.metric(options, {"num_labels": outputs})
        make = metric.whole
        assert make is not None

        def whole() -> Whole:
            made = make()
            return _WithWholeTargets(made)

        return Metric(metric.described, whole=whole)

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        return f"logits, (N, {outputs})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        shape = tuple(found.shape)
        count = len(targets)
        if shape == (count, outputs):
            return None
        return (
            f"the network returns {shape} for {count} inputs, and the data has "
            f"{outputs} classes; it must return logits, ({count}, {outputs})"
        )


def _binary_cross_entropy(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        weights = weights.to(outputs.device)
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weights)


class _WithWholeTargets(Whole):
    """A metric of torchmetrics, which wants whole numbers where the loss wants floats."""

    def __init__(self, metric: Whole) -> None:
        self.metric = metric

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Whole.update`."""
        numbers = targets.long()
        self.metric.update(outputs, numbers)

    def value(self) -> Tensor:
        """See `Whole.value`."""
        return self.metric.value()
