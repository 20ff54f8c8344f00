"""AugCKA-SR: pushes all layers of a network to have dissimilar features, whatever their shapes.

Ni et al. 2023, arXiv 2307.07389: β · L_C with L_C = 2 / (N (N − 1)) · Σ_{i<j} w_ij · CKA(X_i, X_j)
over all N layers, from the biased HSIC (centred Gram matrices).
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import field_validator
from torch import Tensor, nn

from slimfront.trainables.penalties.base import PENALTIES, Tensors
from slimfront.trainables.penalties.cka import (
    ActiveFeatures,
    FeaturePenalty,
    are_different,
    pairwise_cka,
)
from slimfront.trainables.penalties.features import find_layers, output_shapes


def aug_cka_loss(features: Tensors, weights: Tensor | None = None) -> Tensor:
    """L_C of AugCKA-SR: the mean of w_ij · CKA over the pairs of different layers, in [0, 1] with
    weights 1; a scalar.

    Args:
        features: N tensors (n, …), one per layer, of the same n ≥ 2 samples.
        weights: w (N, N), as `cka.pair_weights` gives it; 1 if left out.
    """
    cka = pairwise_cka(features, unbiased=False)
    if weights is not None:
        cka = weights.to(cka) * cka
    count = len(features)
    ordered_pairs = count * (count - 1)
    different = cka.triu(1)
    return 2 / ordered_pairs * different.sum()


@PENALTIES.register("aug_cka")
class AugCKA(FeaturePenalty):
    """AugCKA-SR: the mean CKA over all pairs of layers: those that `find_layers` finds, or
    `layers: [conv1, layer1.0, …]`."""

    nothing_to_do: ClassVar[str] = "there are no two layers in this network to compare"

    layers: tuple[str, ...] | None = None

    @field_validator("layers")
    @classmethod
    def _two_layers(cls, layers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if layers is None or are_different(layers):
            return layers
        raise ValueError("it needs two or more different layers")

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveFeatures:
        shapes = output_shapes(model, sample)
        layers = list(self.layers or find_layers(model, shapes))
        stages = []
        if len(layers) > 1:
            stages.append(layers)
        return ActiveFeatures(self, model, stages, shapes)

    def value(self, features: Sequence[Tensors], weights: Tensors) -> Tensor:
        return aug_cka_loss(features[0], weights[0])
