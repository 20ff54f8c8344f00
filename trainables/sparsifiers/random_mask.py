"""Random sparse training: a random mask that stays.

The baseline that CKA-SR (arXiv 2307.07389) is plugged into, with Erdős–Rényi-kernel densities;
studied by Liu et al. 2022, The unreasonable effectiveness of random pruning, arXiv 2202.02643. The
initial weights are not rescaled, there as here.
"""

from typing import Literal

from slimfront.trainables.sparsifiers.base import (
    SPARSIFIERS,
    ActiveSparsifier,
    Setting,
    TargetSparsifier,
)
from slimfront.trainables.sparsifiers.masks import LayerDensities, choose_masks


class RandomStart(ActiveSparsifier):
    """A sparsifier that begins with a random mask of given densities."""

    def __init__(
        self,
        options: TargetSparsifier,
        setting: Setting,
        sparsity: float,
        densities: LayerDensities,
    ) -> None:
        super().__init__(options, setting)
        masks = choose_masks(self.random_scores(), sparsity, densities)
        self.set_masks(masks)


@SPARSIFIERS.register("random")
class RandomMask(TargetSparsifier):
    """A random mask of density 1 − `sparsity`, fixed from the first step on; `densities` of the
    layers are `erk` or `uniform`."""

    name: Literal["random"] = "random"
    densities: LayerDensities = "erk"

    def attach(self, setting: Setting) -> ActiveSparsifier:
        return RandomStart(self, setting, self.sparsity, self.densities)
