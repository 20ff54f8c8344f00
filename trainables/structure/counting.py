"""Norms that count channels which are not there: what layer, RMS and group norms become when
channels that were 0 are taken out."""

from typing import Any

import torch
from torch import Tensor, nn


class CountingNorm(nn.Module):
    """The layer norm of (…, `channels`) and of `missing` channels of 0 beside them (Ba et al. 2016,
    arXiv 1607.06450); without `centred`, the RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(
        self,
        channels: int,
        missing: int,
        eps: float,
        centred: bool = True,
        weighted: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.missing = missing
        self.eps = eps
        self.centred = centred
        self.weighted = weighted
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if weighted:
            self.weight = nn.Parameter(torch.ones(channels))
        if bias:
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) to the same."""
        total = self.channels + self.missing
        of_missing: Tensor | None = None
        if self.centred:
            mean = x.sum(-1, keepdim=True) / total
            x = x - mean
            of_missing = self.missing * mean.square()
        squares = x.square().sum(-1, keepdim=True)
        if of_missing is not None:
            squares = squares + of_missing
        variance = squares / total
        scale = (variance + self.eps).rsqrt()
        x = x * scale
        if self.weight is not None:
            x = x * self.weight
        if self.bias is not None:
            x = x + self.bias
        return x

    def extra_repr(self) -> str:
        """What is shown of it."""
        return (
            f"{self.channels}, missing={self.missing}, eps={self.eps}, centred={self.centred}, "
            f"weighted={self.weighted}, bias={self.bias is not None}"
        )


class CountingGroupNorm(nn.Module):
    """The group norm (Wu & He 2018, arXiv 1803.08494) of (N, channels, …), and of channels of 0
    beside them: `sizes` says how many of each group are there, and each had `total`."""

    def __init__(self, sizes: tuple[int, ...], total: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.total = total
        self.eps = eps
        self.affine = affine
        channels = sum(sizes)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if affine:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        of_group = torch.zeros(len(sizes), channels)
        start = 0
        for group, size in enumerate(sizes):
            end = start + size
            of_group[group, start:end] = 1
            start = end
        self.register_buffer("of_group", of_group)
        """(groups, channels): 1 where a channel is of a group."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, …) to the same."""
        shape = x.shape
        x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        positions = x.shape[2]
        entries = self.total * positions
        of_group: Tensor = self.of_group  # type: ignore[assignment]
        by_group = of_group.t()
        sums = x.sum(2) @ by_group
        mean = sums / entries  # (N, groups)
        mean_of_channels = mean @ of_group
        x = x - mean_of_channels.unsqueeze(2)
        there = of_group.sum(1)
        absent = (self.total - there) * positions
        of_absent = absent * mean.square()
        of_channels = x.square().sum(2)
        squares = of_channels @ by_group + of_absent
        variance = squares / entries
        scale = (variance + self.eps).rsqrt()
        scale_of_channels = scale @ of_group
        x = x * scale_of_channels.unsqueeze(2)
        if self.weight is not None and self.bias is not None:
            weight = self.weight.unsqueeze(1)
            bias = self.bias.unsqueeze(1)
            x = x * weight + bias
        return x.reshape(shape)

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{self.sizes}, total={self.total}, eps={self.eps}, affine={self.affine}"


def counting(module: Any, kept: Tensor) -> nn.Module:
    """The norm that does what `module`, whose parameters were made smaller already, did when the
    channels that are not in `kept` (channels,) were 0."""
    like = next(module.parameters(), torch.zeros(()))
    if isinstance(module, nn.GroupNorm | CountingGroupNorm):
        made = _of_groups(module, kept)
    else:
        made = _of_channels(module, kept, like.dtype)
    made = made.to(like.device, like.dtype)
    made.train(module.training)
    for name in ("weight", "bias"):
        if getattr(made, name) is not None:
            parameter = getattr(module, name)
            setattr(made, name, parameter)
    return made


def _of_channels(module: Any, kept: Tensor, dtype: torch.dtype) -> nn.Module:
    """The norm over the last axis that counts the channels that are not kept."""
    missing = int((~kept).sum())
    if isinstance(module, CountingNorm):
        missing += module.missing
    eps = module.eps
    if eps is None:  # as nn.RMSNorm has it
        eps = torch.finfo(dtype).eps
    centred = getattr(module, "centred", True)
    if isinstance(module, nn.RMSNorm):
        centred = False
    bias = getattr(module, "bias", None)
    return CountingNorm(
        channels=int(kept.sum()),
        missing=missing,
        eps=eps,
        centred=centred,
        weighted=module.weight is not None,
        bias=bias is not None,
    )


def _of_groups(module: Any, kept: Tensor) -> nn.Module:
    """The norm of groups that counts the channels that are not kept."""
    if isinstance(module, CountingGroupNorm):
        total = module.total
        parts = kept.split(list(module.sizes))
    else:
        total = module.num_channels // module.num_groups
        parts = kept.chunk(module.num_groups)
    sizes = [int(part.sum()) for part in parts]
    return CountingGroupNorm(
        sizes=tuple(sizes),
        total=total,
        eps=module.eps,
        affine=module.affine,
    )
