"""Sequences of token ids: a class for each, or a class for each token."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from slimfront.trainables.tasks.base import TASKS
from slimfront.trainables.tasks.classification import Classification
from slimfront.trainables.tasks.segmentation import PerPlace


@TASKS.register("sequence")
class SequenceClassification(Classification):
    """A class for each sequence of token ids (N, length): cross-entropy of logits (N, classes)."""

    name: Literal["sequence"] = "sequence"  # type: ignore[assignment]


@TASKS.register("tokens")
class TokenClassification(PerPlace):
    """A class for each token (N, length) of sequences of token ids (N, length): cross-entropy of
    logits (N, length, classes).

    Tokens of the number `ignore` do not count: padding, and what follows the first piece of a word.
    """

    name: Literal["tokens"] = "tokens"

    DEFAULT: ClassVar[tuple[str, ...]] = ("accuracy",)
    DIMENSIONS: ClassVar[int] = 2
    PLACES: ClassVar[str] = "(N, length)"

    def arrange(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(-1, -2)

    def as_given(self, arranged: Tensor) -> Tensor:
        return arranged.transpose(-1, -2)

    def shape_of_outputs(self, targets: Tensor, outputs: int) -> str:
        length = targets.shape[1]
        return f"logits, (N, {length}, {outputs})"

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        shape = tuple(found.shape)
        count = len(targets)
        if found.dim() == 3:
            examples, length, logits = shape
            per_token = targets.shape == (examples, length)
            if per_token and logits >= outputs:
                return None
        wanted = self.shape_of_outputs(targets, outputs)
        return f"the network returns {shape} for {count} inputs; it must return {wanted}"
