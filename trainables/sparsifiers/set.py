"""Sparse evolutionary training (SET).

Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse
connectivity, arXiv 1707.04780: a random sparse network; every so often the share ζ of each layer's
weights that is closest to zero is dropped, and as many others are grown at random, with new random
values. We differ in that ζ is of the weights of both signs together, that Erdős–Rényi densities
count kernels too, and that updates end before training does, so that the last grown weights are
trained.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from slimfront.trainables.sparsifiers.base import SPARSIFIERS, Setting, State
from slimfront.trainables.sparsifiers.masks import LayerDensities, drop_and_grow
from slimfront.trainables.sparsifiers.random_mask import RandomStart
from slimfront.trainables.sparsifiers.schedules import Scheduled, Updates


@SPARSIFIERS.register("set")
class SET(Scheduled):
    """SET: every `every` steps the share `drop` (ζ) of each layer's weights moves elsewhere at
    random.

    New weights are drawn normally, with the standard deviation of the layer's initial weights.
    """

    grows: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    name: Literal["set"] = "set"
    densities: LayerDensities = "erk"
    drop: float = Field(0.3, gt=0, lt=1)

    def attach(self, setting: Setting) -> "ActiveSET":
        return ActiveSET(self, setting)


class ActiveSET(RandomStart):
    """SET at work on one network."""

    def __init__(self, options: SET, setting: Setting) -> None:
        self.options = options
        updates = Updates(options, setting.total_steps)
        updates.check_several("set")
        self.updates = updates
        super().__init__(options, setting, options.sparsity, options.densities)
        self.deviations = {}
        for name, weight in self.weights.items():
            mask = self.masks[name]
            deviation = _deviation(weight, mask)
            self.deviations[name] = deviation

    def due(self, step: int) -> bool:
        """Whether weights move: not at the very end, for the last ones grown must be trained."""
        if step == self.updates.last:
            return False
        return self.updates.due(step)

    def update(self, step: int) -> None:
        """Moves weights."""
        growth = self.random_scores()
        for name, weight in self.weights.items():
            mask = self.masks[name]
            before = mask.clone()
            kept = int(before.sum())
            count = int(self.options.drop * kept)
            size = weight.abs()
            after = drop_and_grow(before, size, growth[name], count)
            self.set_masks({name: after})
            values = self._new_values(name, weight)
            was_zero = ~before
            grown = mask & was_zero
            after_growth = torch.where(grown, values, weight)
            weight.copy_(after_growth)

    def _new_values(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Random values for each entry of a weight, as its initial ones were drawn."""
        drawn = torch.randn(weight.shape, generator=self.generator)
        values = drawn.to(weight)
        return values * self.deviations[name]

    def state_dict(self) -> State:
        """The masks, the state of the random numbers, and the deviations of new weights."""
        state = super().state_dict()
        state["deviations"] = self.deviations
        return state

    def load_state_dict(self, state: State) -> None:
        """Continues bit-exactly."""
        super().load_state_dict(state)
        self.deviations = dict(state["deviations"])


def _deviation(weight: torch.Tensor, mask: torch.Tensor) -> float:
    """The root mean square of the weights under the mask: their standard deviation, since initial
    weights have mean 0."""
    if not mask.any():
        return 0.0
    values = weight.detach()
    kept = values[mask]
    squares = kept.square()
    mean_square = squares.mean()
    return float(mean_square.sqrt())
