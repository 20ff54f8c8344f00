"""Pure functions on masks and densities, which the sparsifiers share."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Weights, masks and the like, by the name of the parameter."""
Scores = Mapping[str, Tensor]
"""What each weight is worth, by the name of the parameter; or each unit, by that of its group."""
LayerDensities = Literal["uniform", "erk"]
Densities = Literal["global", "uniform", "erk"]


Shapes = Mapping[str, torch.Size]
"""By the name of the parameter."""
Shares = dict[str, float]
"""The share of the weights that is kept, by the name of the parameter."""


def cloned(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of tensors, by the same names."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.clone()
    return copies


def erdos_renyi_kernel(shapes: Shapes, sparsity: float) -> Shares:
    """Densities of the Erdős–Rényi kernel: Evci et al. 2020, arXiv 1911.11134, section 3.

    The density of a layer of shape (out, in, height, width) is ε · (out + in + height + width) /
    (out · in · height · width), at most 1, with ε such that the layers together have density 1 −
    `sparsity`.
    """
    sizes = {}
    raw = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        sizes[name] = size
        raw[name] = sum(shape) / size
    weights = sum(sizes.values())
    density = 1 - sparsity
    kept = density * weights
    dense: set[str] = set()
    while True:
        in_dense = sum(sizes[name] for name in dense)
        wanted = kept - in_dense
        free = [name for name in shapes if name not in dense]
        scale = 0.0
        if free:
            by_raw = sum(raw[name] * sizes[name] for name in free)
            scale = wanted / by_raw
        densities = dict.fromkeys(shapes, 1.0)
        full = []
        for name in free:
            of_layer = scale * raw[name]
            densities[name] = of_layer
            if of_layer > 1:
                full.append(name)
        if not full:
            return densities
        dense.update(full)


def layer_densities(shapes: Shapes, sparsity: float, densities: LayerDensities) -> Shares:
    """The share of weights that each layer keeps: the same everywhere, or by the Erdős–Rényi
    kernel."""
    if densities == "erk":
        return erdos_renyi_kernel(shapes, sparsity)
    share = 1 - sparsity
    return dict.fromkeys(shapes, share)


def top_mask(scores: Tensor, kept: int) -> Tensor:
    """A mask of the shape of `scores`, True at exactly `kept` of the highest (ties: any of
    them)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if kept:
        row = scores.flatten()
        # Seven times as fast as sorting them.
        highest = row.topk(kept, sorted=False)
        mask[highest.indices] = True
    return mask.view_as(scores)


def choose_masks(scores: Scores, sparsity: float, densities: Densities) -> Tensors:
    """Keeps the weights with the highest scores: of all layers together (`global`), or of each
    layer, by its density.

    Exact to within one weight per tensor; `global` is exact to within one in all.
    """
    if densities == "global":
        return _choose_globally(scores, sparsity)
    shapes = {}
    for name, score in scores.items():
        shapes[name] = score.shape
    shares = layer_densities(shapes, sparsity, densities)
    masks = {}
    for name, score in scores.items():
        share_kept = shares[name]
        masks[name] = _mask_without(score, 1 - share_kept)
    return masks


def _mask_without(scores: Tensor, share: float) -> Tensor:
    """A mask that is False at a share of the scores, the lowest."""
    count = scores.numel()
    dropped = round(share * count)
    kept = count - dropped
    return top_mask(scores, kept)


def _choose_globally(scores: Scores, sparsity: float) -> Tensors:
    rows = []
    sizes = []
    for score in scores.values():
        row = score.flatten()
        rows.append(row)
        sizes.append(len(row))
    together = torch.cat(rows)
    mask = _mask_without(together, sparsity)
    parts = mask.split(sizes)
    masks = {}
    for name, part in zip(scores, parts, strict=True):
        score = scores[name]
        masks[name] = part.view_as(score)
    return masks


def drop_and_grow(mask: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """A mask with as many True as `mask`: `count` of the smallest `magnitude` dropped, as many of
    the largest `growth` grown.

    All three tensors have one shape. Growth is among all that are not True after the drop, so a
    dropped weight may come back.
    """
    before = int(mask.sum())
    kept = before - count
    staying = torch.where(mask, magnitude, -1.0)
    after_drop = top_mask(staying, kept)
    growing = torch.where(after_drop, -torch.inf, growth)
    grown = top_mask(growing, count)
    return after_drop | grown
