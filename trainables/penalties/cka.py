"""CKA-SR: pushes the layers of a stage to have dissimilar features.

Ni et al. 2023, arXiv 2307.07389: β · L_C is added to the loss, with L_C the sum of w_ij · CKA(X_i,
X_j) over the pairs of block outputs of each stage, and linear CKA from the unbiased minibatch HSIC.
We sum ordered pairs as the authors' code does, but leave out i = j, which adds a constant with zero
gradient. Each Gram matrix is formed once, and all pairs of a stage come from one matrix product.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.options import suggest
from slimfront.trainables.penalties.base import PENALTIES, Penalty, Tensors
from slimfront.trainables.penalties.features import (
    Features,
    by_shape,
    check_layers,
    find_layers,
    output_shapes,
)
from slimfront.trainables.precision import to_float32

PairWeights = Mapping[str, Mapping[str, float]]
"""By the names of both layers."""
Stages = tuple[tuple[str, ...], ...]
"""The names of the layers of each stage."""
_BOTH = (-2, -1)
"""The axes of a Gram matrix."""


def unbiased_centring(gram: Tensor) -> Tensor:
    """U-centred Gram matrices, (…, n, n) to (…, n, n), n ≥ 4.

    With the diagonal zeroed and the rows centred so, ⟨K', L'⟩ / (n (n − 3)) is the unbiased HSIC of
    Song et al. 2012, eq. 5 (the form used by minibatch CKA).
    """
    n = gram.shape[-1]
    device = gram.device
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    off_diagonal = ~diagonal
    zeroed = gram * off_diagonal
    others = n - 2
    rows = zeroed.sum(-1, keepdim=True)  # (…, n, 1)
    rows = rows / others
    columns = rows.mT
    pairs = (n - 1) * others
    total = zeroed.sum(_BOTH, keepdim=True)
    total = total / pairs
    without_rows = zeroed - rows
    centred = without_rows - columns + total
    return centred * off_diagonal


def double_centring(gram: Tensor) -> Tensor:
    """H K H of Gram matrices (…, n, n), H = I − 11ᵀ / n: ⟨HKH, HLH⟩ / (n − 1)² is the biased HSIC
    (Gretton et al. 2005)."""
    rows = gram.mean(-1, keepdim=True)
    columns = rows.mT
    total = gram.mean(_BOTH, keepdim=True)
    without_rows = gram - rows
    return without_rows - columns + total


class _Gram(torch.autograd.Function):
    """X Xᵀ of (n, d) features in float32 or wider: its backward pass is one product, (G + Gᵀ) X,
    where autograd makes two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Tensor) -> Tensor:
        rows = to_float32(flat)
        return rows @ rows.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        both = gradient + gradient.T
        kind = flat.device.type
        with torch.autocast(kind, enabled=False):
            rows = to_float32(flat)
            product = both @ rows
        return product.to(flat.dtype)


def pairwise_cka(features: Tensors, *, unbiased: bool = True) -> Tensor:
    """Linear CKA of all pairs of layers, from the unbiased or the biased HSIC.

    Features are never copied: each Gram matrix is one product, and centring is done on it, in
    float64.

    Args:
        features: L tensors (n, …), one per layer, of the same n samples; flattened per sample here.
            The unbiased HSIC needs n ≥ 4, the biased one (centred Gram matrices) n ≥ 2.

    Returns:
        (L, L), symmetric, entries in [−1, 1] (biased: [0, 1]), float32 or wider, under autocast
        too. A layer whose features are constant over the samples has similarity 0 with every layer,
        itself too, and a zero gradient. NaN in, NaN out.
    """
    centring = unbiased_centring if unbiased else double_centring
    kind = features[0].device.type
    with torch.autocast(kind, enabled=False):
        grams = [_Gram.apply(layer.flatten(1)) for layer in features]
        gram = torch.stack(grams)  # (L, n, n)
        precision = torch.finfo(gram.dtype).eps
        # Scale first: the size of the features cancels in CKA, but its squares could overflow or
        # underflow.
        sizes = gram.detach().abs()
        largest = sizes.amax(_BOTH, keepdim=True)
        not_zero = largest > 0
        divisor = torch.where(not_zero, largest, 1)
        scaled = gram / divisor
        centred = centring(scaled.double())
        vectors = centred.flatten(1)  # (L, n²)
        squared = vectors.square().sum(1, keepdim=True)
        # What is left of constant features is rounding: some eps in each entry of a matrix whose
        # largest entry is 1.
        entries = vectors.shape[1]
        rounding_of_entry = 8 * precision
        rounding = rounding_of_entry**2 * entries
        alive = squared > rounding
        norm = torch.where(alive, squared, 1).sqrt()
        scaled_to_one = vectors / norm
        unit = torch.where(alive, scaled_to_one, 0)
        similarities = unit @ unit.T
        return similarities.to(gram.dtype)


def pair_weights(layers: Sequence[str], weights: PairWeights) -> Tensor:
    """(L, L), symmetric: the weights given for pairs of layers in either order, 1 for all others, 0
    on the diagonal."""
    count = len(layers)
    matrix = torch.ones(count, count).fill_diagonal_(0)
    places = {name: place for place, name in enumerate(layers)}
    for first in layers:
        partners = weights.get(first, {})
        for second, weight in partners.items():
            if second == first:
                continue
            if second not in places:
                continue
            i = places[first]
            j = places[second]
            matrix[i, j] = weight
            matrix[j, i] = weight
    return matrix


def cka_loss(stages: Sequence[Tensors], weights: Tensors | None = None) -> Tensor:
    """L_C of CKA-SR (arXiv 2307.07389): Σ over the stages of Σ over ordered pairs i ≠ j of w_ij ·
    CKA; a scalar.

    Args:
        stages: for each stage, the features (n, …) of its layers, two layers or more.
        weights: for each stage, w (layers, layers), as `pair_weights` gives it; 1 if left out.
    """
    sums = []
    for number, features in enumerate(stages):
        cka = pairwise_cka(features)
        if weights is None:
            pairs = torch.ones_like(cka).fill_diagonal_(0)
        else:
            pairs = weights[number].to(cka)
        weighted = pairs * cka
        of_stage = weighted.sum()
        sums.append(of_stage)
    of_stages = torch.stack(sums)
    return of_stages.sum()


class FeaturePenalty(Penalty):
    """What CKA-SR and AugCKA-SR share.

    `strength` is β (the authors use 1e-5 to 1e-2); `samples` of each batch are looked at (−1: all
    of them), in every `every`-th batch only. `pair_weights: {layer: {layer: weight}}` weighs single
    pairs, in either order; all others weigh 1.
    """

    least_batch: ClassVar[int] = 2

    samples: int = Field(8)
    every: int = Field(5, ge=1)
    pair_weights: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = Field(default_factory=dict)

    def range_of(self, name: str) -> dict[str, float | bool] | None:
        """Of `strength`: the one of the papers."""
        if name != "strength":
            return None
        return {"low": 1e-5, "high": 1e-2, "log": True}

    @field_validator("samples")
    @classmethod
    def _enough_samples(cls, samples: int) -> int:
        if samples == -1 or samples >= cls.least_batch:
            return samples
        raise ValueError(
            f"it needs at least {cls.least_batch} samples of a batch (or -1 for the whole batch)"
        )

    def value(self, features: Sequence[Tensors], weights: Tensors) -> Tensor:
        """L_C of the features (n, …) of the layers of each stage, under the pair weights (layers,
        layers) of each; a scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is")


def are_different(layers: Sequence[str]) -> bool:
    """Whether they are two layers or more, and none is named twice."""
    count = len(layers)
    if count < 2:
        return False
    distinct = set(layers)
    return len(distinct) == count


@PENALTIES.register("cka")
class CKA(FeaturePenalty):
    """CKA-SR: the sum of CKA over the pairs of each stage.

    The stages are found as blocks with equal output shapes, or named:
    `stages: [[layer1.0, layer1.1], …]`.
    """

    nothing_to_do: ClassVar[str] = (
        "there are no two layers of one output shape in this network to compare"
    )
    least_batch: ClassVar[int] = 4

    stages: Stages | None = None

    @field_validator("stages")
    @classmethod
    def _two_layers_each(cls, stages: Stages | None) -> Stages | None:
        if stages is None:
            return None
        fit = all(map(are_different, stages))
        if not stages or not fit:
            raise ValueError("a stage is a list of two or more different layers")
        return stages

    def attach(self, model: nn.Module, sample: Tensor) -> "ActiveFeatures":
        shapes = output_shapes(model, sample)
        if self.stages:
            stages = [list(stage) for stage in self.stages]
        else:
            layers = find_layers(model, shapes)
            stages = by_shape(layers, shapes)
        return ActiveFeatures(self, model, stages, shapes)

    def value(self, features: Sequence[Tensors], weights: Tensors) -> Tensor:
        return cka_loss(features, weights)


class ActiveFeatures:
    """CKA-SR or AugCKA-SR on one network: forward hooks keep the features of one batch, and let go
    of them in `loss`."""

    def __init__(
        self,
        options: FeaturePenalty,
        model: nn.Module,
        stages: Sequence[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Raises UserError for a layer that has no features, and for a pair with a weight that is
        in no stage."""
        self.options = options
        self.stages = stages
        self.strength = options.strength
        layers: list[str] = []
        for stage in stages:
            layers += stage
        names = list(dict.fromkeys(layers))
        check_layers(names, dict(shapes))
        self._check_pairs(names)
        device = next(model.parameters()).device
        self.weights = []
        for stage in stages:
            weights = pair_weights(stage, options.pair_weights)
            self.weights.append(weights.to(device))
        self.features = Features(model, names, options.samples)

    def _check_pairs(self, names: Sequence[str]) -> None:
        for first, others in self.options.pair_weights.items():
            for second in others:
                if self._compares(first, second):
                    continue
                unknown = second if first in names else first
                hint = suggest(unknown, names)
                raise UserError(
                    f"penalties: pair_weights: '{first}' and '{second}' are not a pair that is "
                    f"compared; {hint}"
                )

    def _compares(self, first: str, second: str) -> bool:
        if first == second:
            return False
        pair = {first, second}
        return any(pair.issubset(stage) for stage in self.stages)

    @property
    def targets(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def before_batch(self, step: int, scale: float) -> None:
        """Watches the coming forward pass if this batch is an `every`-th one and the penalty is
        on."""
        self.strength = scale * self.options.strength
        phase = self.phase(step, scale)
        watched = phase is not None
        self.features.watch(watched)

    def loss(self) -> Tensor | None:
        """β · L_C of the batch just seen, or None if it was not watched or was too small."""
        value = self.value()
        if value is None:
            return None
        return self.strength * value

    def value(self) -> Tensor | None:
        """L_C of the batch just seen, or None if it was not watched or was too small; a scalar.

        Layers that the network has left out are compared with none.
        """
        kept = self.features.take()
        if not kept:
            return None
        first = next(iter(kept.values()))
        if len(first) < self.options.least_batch:
            return None
        features = []
        weights = []
        for stage, of_pairs in zip(self.stages, self.weights, strict=True):
            seen = [place for place, name in enumerate(stage) if name in kept]
            if len(seen) < 2:
                continue
            features.append([kept[stage[place]] for place in seen])
            if len(seen) < len(stage):
                of_pairs = of_pairs[seen][:, seen]
            weights.append(of_pairs)
        if not features:
            return None
        return self.options.value(features, weights)

    def proximal(self, step_size: float | Tensor) -> None:
        """Nothing: it works through its gradient."""

    def phase(self, step: int, scale: float) -> Hashable:
        """Equal for two training steps in which it computes the same: whether it watches the batch,
        and how strong it is."""
        if step % self.options.every != 0:
            return None
        if scale * self.options.strength > 0:
            return scale
        return None

    def close(self) -> None:
        """Removes the hooks and the kept features."""
        self.features.close()
