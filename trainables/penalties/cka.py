"""CKA-SR: pushes the layers of a stage to have dissimilar features.

Ni et al. 2023, arXiv 2307.07389: β · L_C is added to the loss, with L_C the sum of linear CKA over the pairs of block
outputs of each stage, and CKA from the unbiased minibatch HSIC. We sum ordered pairs as the authors' code does, but
leave out i = j, which adds a constant with zero gradient. Each Gram matrix is formed once, and all pairs of a stage
come from one matrix product.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainables.penalties.base import PENALTIES, Penalty


def unbiased_centring(gram: Tensor) -> Tensor:
    """U-centred Gram matrices, (…, n, n) to (…, n, n), n ≥ 4.

    With the diagonal zeroed and the rows centred so, ⟨K', L'⟩ / (n (n − 3)) is the unbiased HSIC of Song et al. 2012,
    eq. 5 (the form used by minibatch CKA).
    """
    n = gram.shape[-1]
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    zeroed = gram * off_diagonal
    rows = zeroed.sum(-1, keepdim=True) / (n - 2)  # (…, n, 1)
    total = zeroed.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (zeroed - rows - rows.transpose(-2, -1) + total) * off_diagonal


def pairwise_cka(features: Sequence[Tensor]) -> Tensor:
    """Linear CKA of all pairs of layers, from the unbiased HSIC.

    Args:
        features: L tensors (n, …), one per layer, of the same n ≥ 4 samples; flattened per sample here.

    Returns:
        (L, L), symmetric, entries in [−1, 1], float32 or wider. A layer whose features are constant over the samples
        has similarity 0 with every layer, itself too, and a zero gradient. NaN in, NaN out.
    """
    grams = []
    for layer in features:
        flat = layer.flatten(1)
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()
        flat = flat - flat.mean(0, keepdim=True)  # changes nothing in exact arithmetic; keeps float32 accurate
        grams.append(flat @ flat.T)
    gram = torch.stack(grams)  # (L, n, n)
    # Scale first: the size of the features cancels in CKA, but its squares could overflow or underflow.
    largest = gram.detach().abs().amax((-2, -1), keepdim=True)
    gram = gram / torch.where(largest > 0, largest, 1)
    centred = unbiased_centring(gram).flatten(1)  # (L, n²)
    squared = centred.square().sum(1, keepdim=True)
    alive = squared > torch.finfo(squared.dtype).eps
    norm = torch.where(alive, squared, 1).sqrt()
    unit = torch.where(alive, centred / norm, 0)
    return unit @ unit.T


def cka_loss(stages: Sequence[Sequence[Tensor]]) -> Tensor:
    """L_C of CKA-SR (arXiv 2307.07389): the sum of CKA over ordered pairs i ≠ j of layers, over the stages; a scalar.

    Args:
        stages: for each stage, the features (n, …) of its layers, two layers or more.
    """
    sums = []
    for features in stages:
        cka = pairwise_cka(features)
        sums.append(cka.sum() - cka.diagonal().sum())
    return torch.stack(sums).sum()


def find_stages(model: nn.Module, sample: Tensor) -> list[list[str]]:
    """Names of the activation modules (ReLU) with features of equal shape, in order; each group of two or more is a stage.

    In a residual network that is every ReLU of a stage, inside blocks too, not only the blocks' outputs as in the paper.
    An activation module that is called more than once is left out.
    """
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: by_shape[tuple(output.shape)].append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(sample[:2])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    calls = Counter(name for names in by_shape.values() for name in names)
    once = [[name for name in names if calls[name] == 1] for names in by_shape.values()]  # a hook sees one call of a shared one
    return [names for names in once if len(names) > 1]


@PENALTIES.register("cka")
class CKA(Penalty):
    """CKA-SR on the stages of a network, found as blocks with equal output shapes.

    `strength` is β (the authors use 1e-5 to 1e-2); `samples` of each batch are looked at (−1: all of them), in every
    `every`-th batch only.
    """

    nothing_to_do = "there are no two activations of one shape in this network to compare"

    samples: int = Field(8)
    every: int = Field(5, ge=1)

    @field_validator("samples")
    @classmethod
    def _enough_samples(cls, samples: int) -> int:
        if samples != -1 and samples < 4:
            raise ValueError("the unbiased HSIC needs at least 4 samples of a batch (or -1 for the whole batch)")
        return samples

    def attach(self, model: nn.Module, sample: Tensor) -> "ActiveCKA":
        return ActiveCKA(model, find_stages(model, sample), self)


class ActiveCKA:
    """CKA-SR on one network: forward hooks keep the features of one batch, and let go of them in `loss`."""

    def __init__(self, model: nn.Module, stages: list[list[str]], options: CKA) -> None:
        self.options = options
        self.stages = stages
        self.watching = False
        self.strength = options.strength
        self.features: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: self._keep(name, output))
            for names in stages
            for name in names
        ]

    @property
    def targets(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def _keep(self, name: str, output: Tensor) -> None:
        if self.watching:
            self.features[name] = output if self.options.samples == -1 else output[: self.options.samples]

    def before_batch(self, step: int, scale: float) -> None:
        """Watches the coming forward pass if this batch is an `every`-th one and the penalty is on."""
        self.features.clear()
        self.strength = scale * self.options.strength
        self.watching = self.strength > 0 and step % self.options.every == 0

    def loss(self) -> Tensor | None:
        """β · L_C of the batch just seen, or None if it was not watched or was too small (n < 4)."""
        features, self.features, self.watching = self.features, {}, False
        if not features or len(next(iter(features.values()))) < 4:
            return None
        value = cka_loss([[features[name] for name in names] for names in self.stages])
        return self.strength * value

    def proximal(self, step_size: float) -> None:
        """Nothing: CKA-SR works through its gradient."""

    def close(self) -> None:
        """Removes the hooks and the kept features."""
        for handle in self.handles:
            handle.remove()
        self.features.clear()
