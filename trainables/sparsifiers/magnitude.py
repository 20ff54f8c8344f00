"""Gradual magnitude pruning.

Zhu, Gupta: To prune, or not to prune, arXiv 1710.01878, eq. 1: the sparsity rises from 0 to the target on a cubic
schedule, and at each update the smallest weights are dropped. A dropped weight stays 0, so it is never picked again.
We differ in that weights are compared over all layers together by default (`scope: global`).
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trainables.sparsifiers.base import SPARSIFIERS, Masks, Sparsifier


def cubic_sparsity(progress: float, target: float) -> float:
    """Eq. 1 with s_i = 0: target · (1 − (1 − progress)³), `progress` clipped to [0, 1]."""
    clipped = min(max(progress, 0.0), 1.0)
    return target * (1 - (1 - clipped) ** 3)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """A mask of the shape of `scores`, False at exactly round(sparsity · n) of the lowest scores (ties: any of them)."""
    dropped = round(sparsity * scores.numel())
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    if dropped:
        mask[scores.flatten().argsort(stable=True)[:dropped]] = False
    return mask.view_as(scores)


@SPARSIFIERS.register("magnitude")
class Magnitude(Sparsifier):
    """Magnitude pruning to `sparsity` on a cubic schedule between `start` and `end` (fractions of training).

    The masks are updated every `every` steps. `scope: global` ranks the weights of all layers together,
    `scope: layer` gives every layer the target sparsity.
    """

    name: Literal["magnitude"] = "magnitude"
    start: float = Field(0.1, ge=0, le=1)
    end: float = Field(0.7, ge=0, le=1)
    every: int = Field(10, ge=1)
    scope: Literal["global", "layer"] = "global"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start ({self.start}) is after end ({self.end})")
        return self

    def attach(self, model: nn.Module, total_steps: int) -> "ActiveMagnitude":
        return ActiveMagnitude(self, Masks(model), total_steps)


class ActiveMagnitude:
    """Magnitude pruning at work on one network."""

    def __init__(self, options: Magnitude, masks: Masks, total_steps: int) -> None:
        self.options = options
        self.masks = masks
        # The last update happens at `end`, or in the last step if that comes first: the target is always met.
        self.last = max(min(int(options.end * total_steps), total_steps - 1), 0)
        self.first = min(int(options.start * total_steps), self.last)

    def before_step(self) -> None:
        """Keeps the optimiser from building momentum for dropped weights."""
        if self.options.sparsity > 0:
            self.masks.zero_gradients()

    def after_step(self, step: int) -> None:
        """Drops the smallest weights when an update is due, then zeroes all dropped weights."""
        if self.options.sparsity == 0:
            return
        if self.first <= step <= self.last and (step == self.last or (step - self.first) % self.options.every == 0):
            span = max(self.last - self.first, 1)
            progress = 1.0 if step == self.last else (step - self.first) / span
            self._update(cubic_sparsity(progress, self.options.sparsity))
        self.masks.zero_weights()

    @torch.no_grad()
    def _update(self, sparsity: float) -> None:
        # Dropped weights score −1, below any magnitude, so that they stay dropped.
        scores = {n: torch.where(self.masks.masks[n], w.abs(), -1.0) for n, w in self.masks.weights.items()}
        if self.options.scope == "layer":
            self.masks.masks = {name: keep_largest(score, sparsity) for name, score in scores.items()}
            return
        together = keep_largest(torch.cat([s.flatten() for s in scores.values()]), sparsity)
        parts = together.split([s.numel() for s in scores.values()])
        self.masks.masks = {n: part.view_as(s) for (n, s), part in zip(scores.items(), parts, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by parameter name."""
        return self.masks.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the masks."""
        self.masks.load_state_dict(state)
