"""GraNet: gradual pruning with regrowth.

Liu et al. 2021, Sparse training via boosting pruning plasticity with neuroregeneration, arXiv
2106.10404: starts at half the weights; at each update the smallest weights are dropped to meet a
cubic schedule, over all layers together; then the share r (decaying on a cosine) of each layer's
remaining weights is dropped too and as many of the largest gradient are grown, from 0. We differ in
the same two ways as RigL here: the optimiser's step is always taken, and the batch's own gradient
counts.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from slimfront.trainables.sparsifiers.base import SPARSIFIERS, Setting
from slimfront.trainables.sparsifiers.magnitude import magnitudes
from slimfront.trainables.sparsifiers.masks import Densities, choose_masks
from slimfront.trainables.sparsifiers.rigl import GradientGrowth
from slimfront.trainables.sparsifiers.schedules import Scheduled, cosine_decay, cubic_sparsity


@SPARSIFIERS.register("granet")
class GraNet(Scheduled):
    """GraNet: from `initial_sparsity` to `sparsity` on a cubic schedule, with the share `regrow`
    (r) of the rest moved.

    `densities: global` prunes over all layers together, from Erdős–Rényi-kernel densities;
    `uniform` and `erk` hold the densities of the layers throughout. A target below
    `initial_sparsity` starts at the target.
    """

    grows: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    name: Literal["granet"] = "granet"
    every: int = Field(50, ge=1)
    densities: Densities = "global"
    initial_sparsity: float = Field(0.5, ge=0, lt=1)
    regrow: float = Field(0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _has_time(self) -> Self:
        if self.start == self.end:
            raise ValueError(
                f"start and end are both {self.start}, which leaves no time to prune and regrow"
            )
        return self

    def attach(self, setting: Setting) -> "ActiveGraNet":
        return ActiveGraNet(self, setting)


class ActiveGraNet(GradientGrowth):
    """GraNet at work on one network."""

    def __init__(self, options: GraNet, setting: Setting) -> None:
        self.options = options
        self.initial = min(options.initial_sparsity, options.sparsity)
        densities = options.densities
        if densities == "global":
            densities = "erk"
        super().__init__(options, setting, self.initial, densities)

    def update(self, step: int) -> None:
        """Prunes to the schedule and moves weights; at the last update nothing moves any more."""
        options = self.options
        progress = self.updates.progress(step)
        sparsity = cubic_sparsity(progress, options.sparsity, self.initial)
        scores = magnitudes(self)
        masks = choose_masks(scores, sparsity, options.densities)
        self.set_masks(masks)
        share = cosine_decay(progress, options.regrow)
        self.move(share)
