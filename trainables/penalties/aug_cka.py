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

Layers = tuple[str, ...]
"""The names of layers."""


def aug_cka_loss(features: Tensors, weights: Tensor | None = None) -> Tensor:
    """L_C of AugCKA-SR: the mean of w_ij · CKA over the pairs of different layers, in [0, 1] with
    weights 1; a scalar.

    Args:
        features: N tensors (n, …), one per layer, of the same n ≥ 2 samples.
        weights: w (N, N), as `cka.pair_weights` gives it; 1 if left out.
    """
    cka = pairwise_cka(features, unbiased=False)
    if weights is not None:
        weights = weights.to(cka)
        cka = weights * cka
    count = len(features)
    others = count - 1
    ordered_pairs = count * others
    different = cka.triu(1)
    factor = 2 / ordered_pairs
    return factor * different.sum()


@PENALTIES.register("aug_cka")
class AugCKA(FeaturePenalty):
    """AugCKA-SR: the mean CKA over all pairs of layers: those that `find_layers` finds, or
    `layers: [conv1, layer1.0, …]`."""

    nothing_to_do: ClassVar[str] = "there are no two layers in this network to compare"

    layers: Layers | None = None

    @field_validator("layers")
    @classmethod
    def _two_layers(cls, layers: Layers | None) -> Layers | None:
        if layers is None or are_different(layers):
            return layers
        raise ValueError("it needs two or more different layers")

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveFeatures:
        shapes = output_shapes(model, sample)
        chosen = self.layers or find_layers(model, shapes)
        layers = list(chosen)
        stages = []
        if len(layers) > 1:
            stages.append(layers)
        return ActiveFeatures(self, model, stages, shapes)

    def value(self, features: Sequence[Tensors], weights: Tensors) -> Tensor:
        all_layers = features[0]
        of_pairs = weights[0]
        return aug_cka_loss(all_layers, of_pairs)
