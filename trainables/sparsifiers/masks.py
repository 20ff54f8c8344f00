"""Pure functions on masks and densities, which the sparsifiers share."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

LayerDensities = Literal["uniform", "erk"]
Densities = Literal["global", "uniform", "erk"]


def erdos_renyi_kernel(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
    """Densities of the Erdős–Rényi kernel: Evci et al. 2020, arXiv 1911.11134, section 3.

    The density of a layer of shape (out, in, height, width) is ε · (out + in + height + width) /
    (out · in · height · width), at most 1, with ε such that the layers together have density 1 −
    `sparsity`.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        wanted = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        free = [name for name in shapes if name not in dense]
        scale = 0.0
        if free:
            scale = wanted / sum(raw[name] * sizes[name] for name in free)
        full = {name for name in free if scale * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= full


def layer_densities(
    shapes: Mapping[str, torch.Size], sparsity: float, densities: LayerDensities
) -> dict[str, float]:
    """The share of weights that each layer keeps: the same everywhere, or by the Erdős–Rényi
    kernel."""
    if densities == "erk":
        return erdos_renyi_kernel(shapes, sparsity)
    return dict.fromkeys(shapes, 1 - sparsity)


def top_mask(scores: Tensor, kept: int) -> Tensor:
    """A mask of the shape of `scores`, True at exactly `kept` of the highest (ties: any of
    them)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if kept:
        mask[scores.flatten().topk(kept, sorted=False).indices] = (
            True  # seven times as fast as sorting them
        )
    return mask.view_as(scores)


def choose_masks(
    scores: Mapping[str, Tensor], sparsity: float, densities: Densities
) -> dict[str, Tensor]:
    """Keeps the weights with the highest scores: of all layers together (`global`), or of each
    layer, by its density.

    Exact to within one weight per tensor; `global` is exact to within one in all.
    """
    if densities == "global":
        sizes = [score.numel() for score in scores.values()]
        together = top_mask(
            torch.cat([score.flatten() for score in scores.values()]),
            sum(sizes) - round(sparsity * sum(sizes)),
        )
        parts = together.split(sizes)
        return {
            name: part.view_as(score)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    kept = layer_densities(
        {name: score.shape for name, score in scores.items()}, sparsity, densities
    )
    return {
        name: top_mask(score, score.numel() - round((1 - kept[name]) * score.numel()))
        for name, score in scores.items()
    }


def drop_and_grow(mask: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """A mask with as many True as `mask`: `count` of the smallest `magnitude` dropped, as many of
    the largest `growth` grown.

    All three tensors have one shape. Growth is among all that are not True after the drop, so a
    dropped weight may come back.
    """
    after_drop = top_mask(torch.where(mask, magnitude, -1.0), int(mask.sum()) - count)
    return after_drop | top_mask(torch.where(after_drop, -torch.inf, growth), count)
