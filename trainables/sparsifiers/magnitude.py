"""Gradual magnitude pruning (GMP).

Zhu, Gupta 2017: To prune, or not to prune, arXiv 1710.01878, eq. 1: the sparsity rises from 0 to
the target on a cubic schedule, and at each update the smallest weights are dropped. A dropped
weight stays 0, so it is never picked again. We differ in that weights are compared over all layers
together by default (`densities: global`).
"""

from typing import Literal

import torch
from pydantic import Field

from slimfront.trainables.sparsifiers.base import SPARSIFIERS, ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.masks import Densities, Tensors, choose_masks
from slimfront.trainables.sparsifiers.schedules import Scheduled, Updates, cubic_sparsity


def magnitudes(active: ActiveSparsifier) -> Tensors:
    """|w| of the weights, −1 of those dropped, so that these stay dropped."""
    found = {}
    for name, weight in active.weights.items():
        mask = active.masks[name]
        size = weight.detach().abs()
        found[name] = torch.where(mask, size, -1.0)
    return found


@SPARSIFIERS.register("magnitude")
class Magnitude(Scheduled):
    """Magnitude pruning to `sparsity` on a cubic schedule between `start` and `end`, in steps of
    `every`.

    `densities: global` ranks the weights of all layers together, `uniform` and `erk` those of each
    layer.
    """

    name: Literal["magnitude"] = "magnitude"
    start: float = Field(0.1, ge=0, le=1)
    end: float = Field(0.7, ge=0, le=1)
    every: int = Field(10, ge=1)
    densities: Densities = "global"

    def attach(self, setting: Setting) -> "ActiveMagnitude":
        return ActiveMagnitude(self, setting)


class ActiveMagnitude(ActiveSparsifier):
    """Magnitude pruning at work on one network."""

    def __init__(self, options: Magnitude, setting: Setting) -> None:
        super().__init__(options, setting)
        self.options = options
        self.updates = Updates(options, setting.total_steps)

    def due(self, step: int) -> bool:
        """Whether weights are dropped."""
        return self.updates.due(step)

    def update(self, step: int) -> None:
        """Drops the smallest weights."""
        options = self.options
        progress = self.updates.progress(step)
        sparsity = cubic_sparsity(progress, options.sparsity)
        scores = magnitudes(self)
        masks = choose_masks(scores, sparsity, options.densities)
        self.set_masks(masks)
