"""How far a tensor of one network's outputs is from the same tensor of another's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDING, _ROUNDING_OF_HALF = 256, 8
"""Differences of so many machine epsilons of the largest output are rounding, whatever the spread
of the one that differs; the second in types of half precision, which compute in wider ones and
round what they give."""
_HALF = 1e-4
"""Types with larger epsilons are of half precision."""


@dataclass(frozen=True)
class Compared:
    """One tensor of two networks' outputs: how far they are `apart` at most, and the highest and
    lowest finite values, of each element over the inputs (1, …); the largest magnitude of all."""

    apart: Tensor
    high: Tensor
    low: Tensor
    largest: Tensor
    eps: float

    def joined(self, other: "Compared") -> "Compared":
        """The same over the inputs of both."""
        return Compared(
            apart=torch.maximum(self.apart, other.apart),
            high=torch.maximum(self.high, other.high),
            low=torch.minimum(self.low, other.low),
            largest=torch.maximum(self.largest, other.largest),
            eps=self.eps,
        )

    def relative(self, tolerance: float) -> float:
        """The largest difference, relative to the element's spread."""
        spread = self.high - self.low
        spread = spread.clamp_min(0)
        epsilons = _ROUNDING
        if self.eps > _HALF:
            epsilons = _ROUNDING_OF_HALF
        rounding = epsilons * self.eps / tolerance
        scale = spread + self.largest * rounding
        smallest = torch.finfo(torch.float64).tiny
        scale = scale.clamp_min(smallest)
        relative = self.apart / scale
        return float(relative.detach().max())


def _by_kind(wanted: Any, got: Any) -> float | None:
    """0 or infinity where two outputs are not both tensors of some numbers; None where they are, of
    the same shape and type."""
    if isinstance(wanted, Tensor) and isinstance(got, Tensor):
        if wanted.shape != got.shape:
            return float("inf")
        if wanted.dtype != got.dtype:
            return float("inf")
        if wanted.is_floating_point() and wanted.numel():
            return None
        same = torch.equal(wanted, got)
    else:
        same_type = type(wanted) is type(got)
        same = same_type and wanted == got
    if same:
        return 0.0
    return float("inf")


def compare(wanted: Any, got: Any, wider: Any, *, both_nan: bool) -> Compared | float:
    """Two outputs compared, the spread being that of `wider`; 0 or infinity where that takes no
    numbers."""
    by_kind = _by_kind(wanted, got)
    if by_kind is not None:
        return by_kind
    if not _fits(wider, wanted):
        wider = wanted
    eps = torch.finfo(wanted.dtype).eps
    apart = _apart(wanted.double(), got.double(), both_nan=both_nan)
    wider = wider.double()
    finite = wider.isfinite()
    without_infinities = torch.where(finite, wider, 0)
    largest = without_infinities.abs().max()
    if wider.dim() == 0:
        none = torch.zeros_like(apart)
        return Compared(
            apart=apart,
            high=none,
            low=none,
            largest=largest,
            eps=eps,
        )
    high = torch.where(finite, wider, -torch.inf)
    low = torch.where(finite, wider, torch.inf)
    return Compared(
        apart=apart.amax(0, keepdim=True),
        high=high.amax(0, keepdim=True),
        low=low.amin(0, keepdim=True),
        largest=largest,
        eps=eps,
    )


def _fits(wider: Any, wanted: Tensor) -> bool:
    """Whether outputs for more inputs are of the same elements."""
    if not isinstance(wider, Tensor):
        return False
    if wider.dim() != wanted.dim():
        return False
    return wider.shape[1:] == wanted.shape[1:]


def _apart(wanted: Tensor, got: Tensor, *, both_nan: bool) -> Tensor:
    """How far each entry of two outputs is apart."""
    equal = wanted == got  # infinities too
    if both_nan:
        equal |= wanted.isnan() & got.isnan()
    gap = got - wanted
    return torch.where(equal, 0, gap.abs())
