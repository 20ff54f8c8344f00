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
from slimfront.trainables.tasks.classes import is_one_hot
from slimfront.trainables.tasks.classification import (
    MULTICLASS,
    ClassWeights,
    class_weights,
    soft_cross_entropy,
    too_few_logits,
    too_many_logits,
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
        self._refuse_other_shapes(targets)
        targets = targets.long()
        counted = self._counted(targets)
        if not len(counted):
            raise UserError(f"no place of any example counts: all are {self.ignore}, task.ignore")
        values = counted.unique()
        numbers = values.tolist()
        known = self.classes or outputs or len(names)
        any_two = len(numbers) == 2 and numbers != [0, 1]
        if any_two and not known:
            return self._of_two(targets, numbers)
        return self._numbered(targets, numbers, known, names)

    def _refuse_other_shapes(self, targets: Tensor) -> None:
        if targets.dim() == self.DIMENSIONS and whole(targets):
            return
        shape = tuple(targets.shape)
        raise UserError(
            f"the data has targets of shape {shape} and type {targets.dtype}; "
            f"the task {self.name} takes a whole number for each place, {self.PLACES}"
        )

    def _counted(self, targets: Tensor) -> Tensor:
        """The classes of all places that count, in a row."""
        counts = targets != self.ignore
        return targets[counts]

    def _of_two(self, targets: Tensor, numbers: list[int]) -> Encoded:
        """Any two numbers as 0 and 1, such as the 0 and 255 of a mask."""
        mapped = torch.full_like(targets, self.ignore)
        for place, number in enumerate(numbers):
            here = targets == number
            mapped[here] = place
        names = tuple(map(str, numbers))
        return Encoded(mapped, 2, names)

    def _numbered(
        self, targets: Tensor, numbers: list[int], known: int | None, names: Sequence[str]
    ) -> Encoded:
        """Numbers from 0 as they are."""
        least = numbers[0]
        largest = numbers[-1]
        count = known or largest + 1
        if least < 0 or largest >= count:
            raise UserError(
                f"the data has classes from {least} to {largest}, and the task {self.name} takes "
                f"0 … {count - 1}; set task.ignore to the number of places that do not count, such "
                "as 255"
            )
        if count < 2 or len(numbers) < 2:
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
        counted = self._counted(targets)
        count = len(counted)
        weights = class_weights(self.class_weights, counted, encoded)
        places = None
        if count < targets.numel():
            examples = len(targets)
            places = count / examples
        return partial(weighted_cross_entropy, weights=weights, ignore=self.ignore, places=places)

    def distillation(
        self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        """As of a classification, over the places that count."""
        counted = targets != self.ignore
        errors = soft_cross_entropy(outputs, teacher, temperature)
        kept = errors * counted
        count = counted.sum().clamp_min(1)
        return kept.sum() / count

    def metric(self, options: MetricOptions, outputs: int) -> Metric:
        name = str(options.name)
        known = self.KNOWN[name]
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
        _, *size = targets.shape
        places = ", ".join(map(str, size))
        return f"logits, (N, {outputs}, {places})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        count = len(targets)
        shape = tuple(found.shape)
        if found.dim() == 4:
            examples, _, height, width = shape
            if targets.shape == (examples, height, width):
                return too_few_logits(found, outputs)
        wanted = self.shape_of_outputs(targets, outputs)
        return f"the network returns {shape} for {count} inputs; it must return {wanted}"

    def unused_outputs(self, found: Tensor, outputs: int) -> str | None:
        return too_many_logits(found, outputs)
