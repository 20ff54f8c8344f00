"""SNIP: one-shot pruning at initialisation.

Lee et al. 2019, SNIP: single-shot network pruning based on connection sensitivity, arXiv
1810.02340: before training, the weights with the largest |w · ∂loss/∂w| on one batch are kept, over
all layers together, and the mask stays. We differ in that the sensitivity is taken at the initial
weights as they are, without a variance-scaling initialisation of its own.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.gpu import gpus_among
from slimfront.trainables.sparsifiers.base import (
    SPARSIFIERS,
    ActiveSparsifier,
    Setting,
    TargetSparsifier,
    prunable_weights,
)
from slimfront.trainables.sparsifiers.masks import Densities, Tensors, choose_masks
from slimfront.trainables.structure.copying import copied


def sensitivities(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensors:
    """|w · ∂loss/∂w| of the prunable weights, on the task loss of one batch; `model` and its
    gradients are left alone."""
    twin = copied(model).train()
    for parameter in twin.parameters():  # those that are frozen count too
        parameter.requires_grad_(parameter.is_floating_point())
    weights = prunable_weights(twin)
    gpus = gpus_among(inputs.device)
    with torch.random.fork_rng(devices=gpus):
        outputs = twin(inputs)
        loss = loss_of(outputs, targets)
    leaves = list(weights.values())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if gradient is None:
            found[name] = torch.zeros_like(weight)
            continue
        change = weight * gradient
        found[name] = change.detach().abs()
    return found


@SPARSIFIERS.register("snip")
class SNIP(TargetSparsifier):
    """SNIP on a batch of `samples` training examples; `densities: global` ranks all layers
    together, as the paper does."""

    name: Literal["snip"] = "snip"
    densities: Densities = "global"
    samples: int = Field(128, ge=2)

    def attach(self, setting: Setting) -> ActiveSparsifier:
        active = ActiveSparsifier(self, setting)
        inputs, targets = setting.examples(self.samples)
        sensitivity = sensitivities(setting.model, inputs, targets, setting.loss)
        scores = {}
        for name in active.weights:
            scores[name] = sensitivity[name]
        masks = choose_masks(scores, self.sparsity, self.densities)
        active.set_masks(masks)
        return active
