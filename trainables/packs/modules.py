"""Layers of a pack's network that compute what torch's do, in a way that suits `torch.func.vmap`
better."""

from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.precision import to_float32


class _Linear(nn.Linear):
    """A linear layer as a product from the left: autograd then makes the gradient of the weight as
    it lies.

    The gradient of `F.linear` is transposed under vmap, and copying it costs as much as the
    product.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if inputs.dim() != 2:
            return super().forward(inputs)
        transposed = torch.mm(self.weight, inputs.t())
        outputs = transposed.t()
        if self.bias is None:
            return outputs
        return outputs + _like(self.bias, outputs)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    if tensor.dtype == other.dtype:
        return tensor
    return tensor.to(other.dtype)


def _halved(kind: Any) -> type[nn.Module]:
    """A convolution that autocast applies to: under vmap it does not find all of them (none on a
    CPU)."""

    class Halved(kind):
        def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if torch.is_autocast_enabled(inputs.device.type):
                inputs = _half(inputs)
                weight = _half(weight)
                if bias is not None:
                    bias = _half(bias)
            made: Tensor = super()._conv_forward(inputs, weight, bias)
            return made

    return Halved


def _half(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32:
        return tensor.bfloat16()
    return tensor


def _widened(kind: Any) -> type[nn.Module]:
    """A normalisation that takes any type, computes in float32 and gives back that type: vmap's
    rules want one type for all."""

    class Widened(kind):
        def forward(self, inputs: Tensor) -> Tensor:
            wide = to_float32(inputs)
            made: Tensor = super().forward(wide)
            return _like(made, inputs)

    return Widened


_ALWAYS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear}

_IN_BF16: dict[type[nn.Module], type[nn.Module]] = {
    **{kind: _halved(kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{
        kind: _widened(kind)
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
    },
}


def replace_layers(model: nn.Module, *, bf16: bool) -> None:
    """Puts these in the place of torch's own, which share their weights; `bf16`: those too that
    autocast needs."""
    ours = dict(_ALWAYS)
    if bf16:
        ours |= _IN_BF16
    for module in model.modules():
        kind = type(module)
        module.__class__ = ours.get(kind, kind)
