"""N:M sparsity: of every m weights in a row at most n are non-zero, such as 2:4, which GPUs have
kernels for.

Mishra et al. 2021, Accelerating sparse deep neural networks, arXiv 2104.08378: the network is
trained dense; then the n largest weights of every m along the input dimension are kept, and
training goes on with that mask. We differ in that both trainings share one schedule, and no
permutation of channels is searched for.
"""

import logging
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.sparsifiers.base import (
    SPARSIFIERS,
    ActiveSparsifier,
    Setting,
    Sparsifier,
    is_own_layer,
)

log = logging.getLogger(__name__)


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """A mask of a weight (out, in, …), True at exactly the n largest |w| of every m neighbours
    along `in`, a multiple of m."""
    values = weight.detach()
    sizes = values.abs()
    rows = sizes.movedim(1, -1)  # (out, …, in)
    *others, _ = rows.shape
    groups = rows.reshape(*others, -1, m)  # (out, …, in / m, m)
    largest = groups.topk(n)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, largest.indices, True)
    by_rows = mask.reshape(rows.shape)
    by_outputs = by_rows.movedim(-1, 1)
    return by_outputs.contiguous()


@SPARSIFIERS.register("nm")
class NM(Sparsifier):
    """N:M masks, chosen once after the fraction `start` of training; the sparsity is 1 − n / m.

    Layers whose number of inputs (per group) is not a multiple of m stay dense, and so do those
    that are not of torch, of which it is not known along which axis their inputs lie.
    """

    name: Literal["nm"] = "nm"
    n: int = Field(2, ge=1)
    m: int = Field(4, ge=2)
    start: float = Field(0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _n_below_m(self) -> Self:
        if self.n >= self.m:
            raise ValueError(
                f"n ({self.n}) must be below m ({self.m}): of every m weights, n are kept"
            )
        return self

    def attach(self, setting: Setting) -> "ActiveNM":
        return ActiveNM(self, setting)


class ActiveNM(ActiveSparsifier):
    """N:M masks at work on one network."""

    def __init__(self, options: NM, setting: Setting) -> None:
        super().__init__(options, setting)
        self.options = options
        kept = {}
        for name, weight in self.weights.items():
            layer, _, _ = name.rpartition(".")
            inputs = weight.shape[1]
            rest = inputs % options.m
            if rest == 0 and not is_own_layer(setting.model.get_submodule(layer)):
                kept[name] = weight
        dense = [f"'{name}'" for name in self.weights if name not in kept]
        if not kept:
            raise UserError(
                f"sparsifier: no layer of this network has a multiple of m ({options.m}) inputs; "
                "choose another m"
            )
        if dense:
            log.warning(
                "sparsifier nm: dense stays what has inputs that are no multiple of m (%d), or lie "
                "along an axis that is not known: %s",
                options.m,
                first_few(dense),
            )
        self.weights = kept
        self.masks = {name: self.masks[name] for name in kept}
        self.begin = int(options.start * setting.total_steps)

    def due(self, step: int) -> bool:
        """Whether the masks are chosen, once."""
        return step == self.begin

    def update(self, step: int) -> None:
        """Chooses the masks."""
        options = self.options
        masks = {}
        for name, weight in self.weights.items():
            mask = nm_mask(weight, options.n, options.m)
            masks[name] = mask
        self.set_masks(masks)
