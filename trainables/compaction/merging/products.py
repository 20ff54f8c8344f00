"""Two weight layers with nothing between them as one layer (arXiv 2006.15604, section 2; Fu et al.
2022, arXiv 2206.00843, for convolutions)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction.layers import with_weights
from slimfront.trainables.structure.graph import Conv, WeightLayer

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@torch.no_grad()
def product(
    first: WeightLayer, second: WeightLayer, *, moves_padding: bool = False
) -> WeightLayer | None:
    """The layer x ↦ second(first(x)), multiplied in float64; None where no single layer does that.

    Linear: W = W₂W₁ (out₂, in₁), b = W₂b₁ + b₂. Convolutions, of any strides, dilations and groups:
    a kernel of d₁(k₁ − 1) + s₁d₂(k₂ − 1) + 1 along each axis, with stride s₁s₂ and padding
    p₁ + s₁p₂. It is exact where the second has no padding, or where what the first gives outside of
    the image is the zero that the second pads by: a 1×1 without padding and without a bias.

    Args:
        moves_padding: also where it is not: as if all padding stood in front of the first layer.
            The interior of the image is the same then, and the border is not.
    """
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return _product_of_linear(first, second)
    if not isinstance(first, Conv) or not isinstance(second, Conv):
        return None
    if not fit(first, second):
        return None
    if not moves_padding and any(second.padding) and not gives_zero_outside(first):
        return None
    return _product_of_convolutions(first, second)


def fit(first: WeightLayer, second: WeightLayer) -> bool:
    """Whether the two are of one kind, and what they pad by is known: whether they are one layer,
    but for the border of images."""
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    for layer in (first, second):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
    return first.weight.dim() == second.weight.dim()


def gives_zero_outside(layer: WeightLayer) -> bool:
    """Whether a layer gives zero where its whole kernel lies outside of the image."""
    if layer.bias is not None and bool(layer.bias.any()):
        return False
    return isinstance(layer, Conv) and is_pointwise(layer)


def is_pointwise(layer: Conv) -> bool:
    """Whether it is 1×1 without padding."""
    return set(layer.kernel_size) == {1} and not any(layer.padding)


def entries_of_product(layers: Sequence[WeightLayer]) -> int:
    """How many weights layers would have as one, without multiplying them."""
    first, last = layers[0], layers[-1]
    if isinstance(first, nn.Linear) or isinstance(last, nn.Linear):
        entries: int = first.weight.shape[1] * last.weight.shape[0]
        return entries
    convolutions = [layer for layer in layers if isinstance(layer, Conv)]
    groups = {layer.groups for layer in convolutions}
    shared = groups.pop() if len(groups) == 1 else 1
    positions = 1
    for axis in range(len(first.kernel_size)):
        positions *= _positions(convolutions, axis)
    return first.in_channels // shared * last.out_channels * positions


def _positions(layers: Sequence[Conv], axis: int) -> int:
    """How long the kernel of convolutions as one is along an axis."""
    wide = [place for place, layer in enumerate(layers) if set(layer.kernel_size) != {1}]
    if not wide:
        return 1
    strides_before = {step for layer in layers[: wide[0]] for step in layer.stride}
    if len(wide) == 1 and strides_before <= {1}:
        # One that is dilated among pointwise ones stays so.
        return layers[wide[0]].kernel_size[axis]
    span, stride = 1, 1
    for layer in layers:
        span += stride * layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        stride *= layer.stride[axis]
    return span


def _product_of_linear(first: nn.Linear, second: nn.Linear) -> WeightLayer:
    matrix = second.weight.double()
    weight = matrix @ first.weight.double()
    return with_weights(second, weight, _bias(first, matrix, second.bias))


def _product_of_convolutions(first: Conv, second: Conv) -> WeightLayer:
    groups = first.groups if first.groups == second.groups else 1
    kernels = [_in_groups(layer, groups) for layer in (first, second)]
    axes = range(len(first.stride))
    steps = [first.stride[axis] * second.dilation[axis] for axis in axes]
    dilation = _common_dilation(first, second)
    if dilation is None:
        dilation = [1] * len(axes)
        inner = _spread(kernels[0], first.dilation)
        outer = _spread(kernels[1], steps)
    else:
        inner, outer = kernels
    weight = torch.cat([_correlated(a, b) for a, b in zip(inner, outer, strict=True)])
    matrix = _block_diagonal(kernels[1].flatten(3).sum(3))
    combined = with_weights(second, weight, _bias(first, matrix, second.bias))
    assert isinstance(combined, Conv)
    combined.groups = groups
    combined.in_channels = first.in_channels
    combined.stride = tuple(first.stride[axis] * second.stride[axis] for axis in axes)
    combined.dilation = tuple(dilation)
    combined.padding = tuple(
        int(first.padding[axis]) + first.stride[axis] * int(second.padding[axis]) for axis in axes
    )
    return combined


def _in_groups(layer: Conv, groups: int) -> Tensor:
    """Its kernels (groups, out, in, …), in float64: zero where it has more groups and an output
    does not see an input."""
    weight = layer.weight.double()
    if groups == layer.groups:
        grouped: Tensor = weight.unflatten(0, (groups, -1))
        return grouped
    assert groups == 1
    outputs, inputs = weight.shape[0] // layer.groups, weight.shape[1]
    full = weight.new_zeros(layer.out_channels, layer.in_channels, *weight.shape[2:])
    for group in range(layer.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        columns = slice(group * inputs, (group + 1) * inputs)
        full[rows, columns] = weight[rows]
    return full.unsqueeze(0)


def _common_dilation(first: Conv, second: Conv) -> list[int] | None:
    """The dilation that the product has where one of the two is a single point; None where zeros
    have to be written out between the entries of both."""
    if set(second.kernel_size) == {1}:
        return list(first.dilation)
    if set(first.kernel_size) == {1} and set(first.stride) == {1}:
        return list(second.dilation)
    return None


def _spread(kernels: Tensor, steps: Sequence[int]) -> Tensor:
    """Kernels (groups, out, in, …) with `step` − 1 zeros between the entries of each axis."""
    sizes = [(size - 1) * step + 1 for size, step in zip(kernels.shape[3:], steps, strict=True)]
    spread = kernels.new_zeros(*kernels.shape[:3], *sizes)
    every = tuple(slice(None, None, step) for step in steps)
    spread[(slice(None), slice(None), slice(None), *every)] = kernels
    return spread


def _correlated(inner: Tensor, outer: Tensor) -> Tensor:
    """The kernel (out, in, …) of correlating with `inner` (between, in, …), then with `outer` (out,
    between, …): the full convolution of the two."""
    axes = inner.dim() - 2
    flipped = inner.transpose(0, 1).flip(list(range(2, inner.dim())))
    margin = [size - 1 for size in inner.shape[2:]]
    full: Tensor = _CONVOLVE[axes](outer, flipped, padding=margin)
    return full


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(groups, out, in) as one matrix (groups · out, groups · in)."""
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix


def _bias(first: WeightLayer, matrix: Tensor, bias: Tensor | None) -> Tensor | None:
    """`matrix` (out₂, out₁) times the first bias plus the second; None if there is neither."""
    if first.bias is None:
        return bias
    moved: Tensor = matrix @ first.bias.double()
    if bias is None:
        return moved
    return moved + bias.double()
