"""Attention between projections that are layers of their own, as modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(QKᵀ / √d) V of each head, between the projections (Vaswani et al. 2017, arXiv
    1706.03762, eq. 1); no parameters.

    `dropout` is the share of attention weights that are zeroed in training mode; `scale` is what
    scores are multiplied by, 1 / √d if None.
    """

    def __init__(
        self,
        heads: int,
        batch_first: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.batch_first = batch_first
        self.dropout = dropout
        self.scale = scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(N, L, heads · d), (N, S, heads · d), (N, S, heads · e) to (N, L, heads · e); L, S before
        N without `batch_first`.

        `mask` (L, S) and `padding` (N, S) are added before the softmax, or say with True what is
        not attended to, as `attn_mask` and `key_padding_mask` of `nn.MultiheadAttention`.
        """
        swapped = query.dim() == 3 and not self.batch_first
        inputs = [query, key, value]
        if swapped:
            inputs = [part.transpose(0, 1) for part in inputs]
        q, k, v = [self._by_head(part) for part in inputs]
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_merged(mask, padding, q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        out = attended.transpose(-3, -2).flatten(-2)
        if swapped:
            out = out.transpose(0, 1)
        return out

    def _by_head(self, projected: Tensor) -> Tensor:
        """(…, L, heads · d) to (…, heads, L, d)."""
        split: Tensor = projected.unflatten(-1, (self.heads, -1))
        return split.transpose(-3, -2)

    def extra_repr(self) -> str:
        """What is shown of it."""
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"{self.heads}, batch_first={self.batch_first}, dropout={self.dropout}{scale}"


def _merged(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that `scaled_dot_product_attention` takes, which says with True what is
    attended to."""
    if padding is not None:
        padding = padding[..., None, None, :]  # (N, S) to (N, heads, L, S)
        if mask is None:
            mask = padding
        elif mask.dtype == padding.dtype == torch.bool:
            mask = mask | padding
        else:
            mask = _added(mask, dtype) + _added(padding, dtype)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return ~mask
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of True as what is added before the softmax."""
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros_like(mask, dtype=dtype)
    return zeros.masked_fill(mask, float("-inf"))


class ScaledDotProduct(nn.Module):
    """`scaled_dot_product_attention` as a module, whose `dropout` acts in training mode alone."""

    def __init__(
        self,
        dropout: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def options(self) -> dict[str, Any]:
        """What the function is given beside tensors and dropout."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """(…, L, d), (…, S, d), (…, S, e) to (…, L, e); `mask` as the function takes it."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, **self.options()
        )
