"""RigL: sparse training that grows weights where the gradient is large.

Evci et al. 2020, Rigging the lottery, arXiv 1911.11134: a random sparse network; every ΔT steps
until T_end, of each layer the share α / 2 · (1 + cos(π t / T_end)) of the weights that are smallest
is dropped, and as many of those with the largest gradient are grown, from 0. A weight that is
dropped and grown at once keeps its value, as in the authors' code. We differ in that the
optimiser's step is taken in steps with an update too, and the batch whose gradient counts is the
one just trained on.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers.base import SPARSIFIERS, Setting
from slimfront.trainables.sparsifiers.masks import LayerDensities, Tensors, drop_and_grow
from slimfront.trainables.sparsifiers.random_mask import RandomStart
from slimfront.trainables.sparsifiers.schedules import Scheduled, Updates, cosine_decay


class GradientGrowth(RandomStart):
    """A sparsifier that grows weights by the size of their gradients (those of dropped weights too)
    in steps with an update."""

    def __init__(
        self, options: Scheduled, setting: Setting, sparsity: float, densities: LayerDensities
    ) -> None:
        updates = Updates(options, setting.total_steps)
        updates.check_several(options.name)
        self.updates = updates
        super().__init__(options, setting, sparsity, densities)
        self.gradients: Tensors = {}

    def due(self, step: int) -> bool:
        """Whether weights move after this step."""
        return self.updates.due(step)

    def before_step(self, step: int) -> None:
        """Keeps the dense gradients if there is an update after this step, and then zeroes those of
        dropped weights."""
        if self.due(step):
            self._keep_gradients()
        super().before_step(step)

    def _keep_gradients(self) -> None:
        """The size of each entry's gradient."""
        self.gradients = {}
        for name, weight in self.weights.items():
            gradient = weight.grad
            if gradient is None:
                gradient = torch.zeros_like(weight)
            self.gradients[name] = gradient.abs()

    def move(self, share: float) -> None:
        """Moves the `share` of each layer's smallest weights to the largest gradients; what grows
        starts from 0.

        Raises:
            UserError: if nobody has looked at the gradients of this step.
        """
        if not self.gradients:
            raise UserError(
                "sparsifier rigl: weights grow by the gradients of the step, and before_step was "
                "not called; call it between the backward pass and the optimiser's step"
            )
        moved = {}
        for name, weight in self.weights.items():
            mask = self.masks[name]
            kept = int(mask.sum())
            count = int(share * kept)
            size = weight.abs()
            growth = self.gradients[name]
            moved[name] = drop_and_grow(mask, size, growth, count)
        self.set_masks(moved)
        self.gradients = {}


@SPARSIFIERS.register("rigl")
class RigL(Scheduled):
    """RigL: every `every` steps (ΔT) until `end`, the share `drop` (α, decaying on a cosine) of
    each layer's weights moves."""

    grows: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    name: Literal["rigl"] = "rigl"
    densities: LayerDensities = "erk"
    drop: float = Field(0.3, gt=0, lt=1)

    def attach(self, setting: Setting) -> "ActiveRigL":
        return ActiveRigL(self, setting)


class ActiveRigL(GradientGrowth):
    """RigL at work on one network."""

    def __init__(self, options: RigL, setting: Setting) -> None:
        self.options = options
        super().__init__(options, setting, options.sparsity, options.densities)

    def update(self, step: int) -> None:
        """Moves weights; at T_end the share is 0."""
        progress = self.updates.progress(step)
        share = cosine_decay(progress, self.options.drop)
        self.move(share)
