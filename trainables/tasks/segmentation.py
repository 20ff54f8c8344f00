"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks.active import Criterion
from slimfront.trainables.tasks.base import TASKS, Encoded, Task
from slimfront.trainables.tasks.classification import (
    MULTICLASS,
    ClassWeights,
    class_weights,
    is_one_hot,
    soft_cross_entropy,
    too_few_logits,
    weighted_cross_entropy,
)
from slimfront.trainables.tasks.metrics import Known, Metric, MetricOptions
from slimfront.trainables.tasks.targets import as_tensor, whole


class PerPlace(Task):
    """What tasks share that have a class for each place of an example: pixels, or tokens."""

    class_weights: ClassWeights = None
    ignore: int = -100
    classes: int | None = Field(None, ge=2)

    KNOWN: ClassVar[Mapping[str, Known]] = {
        **MULTICLASS,
        "accuracy": Known("classification.MulticlassAccuracy", defaults={"average": "micro"}),
    }
    LOSSES: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    DIMENSIONS: ClassVar[int] = 3
    PLACES: ClassVar[str] = "(N, height, width)"

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        targets = as_tensor(given, self.name)
        targets = self._places(targets)
        if targets.dim() != self.DIMENSIONS or not whole(targets):
            shape = tuple(targets.shape)
            raise UserError(
                f"the data has targets of shape {shape} and type {targets.dtype}; "
                f"the task {self.name} takes a whole number for each place, {self.PLACES}"
            )
        targets = targets.long()
        counts = targets != self.ignore
        counted = targets[counts]
        if not len(counted):
            raise UserError(f"no place of any example counts: all are {self.ignore}, task.ignore")
        values = counted.unique()
        known = self.classes or outputs or len(names)
        if not known and len(values) == 2 and values.tolist() != [0, 1]:
            return self._of_two(targets, values)
        return self._numbered(targets, values, known, names)

    def _of_two(self, targets: Tensor, values: Tensor) -> Encoded:
        """Any two numbers as 0 and 1, such as the 0 and 255 of a mask."""
        mapped = torch.full_like(targets, self.ignore)
        names = []
        for place, value in enumerate(values.tolist()):
            here = targets == value
            mapped[here] = place
            names.append(str(value))
        return Encoded(mapped, 2, tuple(names))

    def _numbered(
        self, targets: Tensor, values: Tensor, known: int | None, names: Sequence[str]
    ) -> Encoded:
        """Numbers from 0 as they are."""
        least = int(values[0])
        largest = int(values[-1])
        count = known or largest + 1
        if least < 0 or largest >= count:
            raise UserError(
                f"the data has classes from {least} to {largest}, and the task {self.name} takes "
                f"0 … {count - 1}; set task.ignore to the number of places that do not count, such "
                "as 255"
            )
        if count < 2 or len(values) < 2:
            raise UserError(f"all places have one and the same class; {self.name} needs two")
        if len(names) != count:
            return Encoded(targets, count)
        return Encoded(targets, count, tuple(names))

    def _places(self, targets: Tensor) -> Tensor:
        """Targets with a channel of their own, (N, 1, …), or one for each class, without it."""
        if targets.dim() != self.DIMENSIONS + 1:
            return targets
        if targets.shape[1] == 1:
            return targets.squeeze(1)
        if is_one_hot(targets):
            return targets.long().argmax(1)
        return targets

    def criterion(self, targets: Tensor, encoded: Encoded) -> Criterion:
        counts = targets != self.ignore
        counted = targets[counts]
        count = len(counted)
        weights = class_weights(self.class_weights, counted, encoded)
        places = None
        if count < targets.numel():
            places = count / len(targets)
        return partial(weighted_cross_entropy, weights=weights, ignore=self.ignore, places=places)

    def distillation(
        self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        """As of a classification, over the places that count."""
        counted = targets != self.ignore
        errors = soft_cross_entropy(outputs, teacher, temperature)
        total = (errors * counted).sum()
        count = counted.sum().clamp_min(1)
        return total / count

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        known = self.KNOWN[str(options.name)]
        given = {"num_classes": outputs, "ignore_index": self.ignore}
        return known.metric(options, given)


@TASKS.register("segmentation")
class Segmentation(PerPlace):
    """Cross-entropy of logits (N, classes, height, width) with a class for each pixel (N, height,
    width); its quality is the mean intersection over union of the classes.

    Pixels of the number `ignore` do not count.
    """

    name: Literal["segmentation"] = "segmentation"

    DEFAULT: ClassVar[tuple[str, ...]] = ("miou", "accuracy")

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        places = ", ".join(map(str, targets.shape[1:]))
        return f"logits, (N, {outputs}, {places})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        count, *places = targets.shape
        shape = tuple(found.shape)
        per_place = len(shape) == 4 and shape[2:] == tuple(places)
        if per_place and shape[0] == count:
            return too_few_logits(found, outputs)
        wanted = self.shape_of_outputs(targets, outputs)
        return f"the network returns {shape} for {count} inputs; it must return {wanted}"
