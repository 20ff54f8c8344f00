"""Two weight layers with nothing between them as one layer (arXiv 2006.15604, section 2; Fu et al.
2022, arXiv 2206.00843, for convolutions)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction.layers import with_weights
from slimfront.trainables.structure.graph import Conv, WeightLayer

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PerAxis = tuple[int, ...]
"""A number for each axis of a kernel."""


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
    if are_one(first, second, moves_padding=moves_padding):
        return _product_of_convolutions(first, second)
    return None


def are_one(first: WeightLayer, second: WeightLayer, *, moves_padding: bool = False) -> bool:
    """Whether `product` gives a layer."""
    if not fit(first, second):
        return False
    if isinstance(second, nn.Linear) or moves_padding:
        return True
    return not any(second.padding) or gives_zero_outside(first)


def fit(first: WeightLayer, second: WeightLayer) -> bool:
    """Whether the two are of one kind, and what they pad by is known: whether they are one layer,
    but for the border of images."""
    if isinstance(first, nn.Linear):
        return isinstance(second, nn.Linear)
    if isinstance(second, nn.Linear):
        return False
    for layer in (first, second):
        if layer.padding_mode != "zeros":
            return False
        if isinstance(layer.padding, str):
            return False
    return first.weight.dim() == second.weight.dim()


def gives_zero_outside(layer: WeightLayer) -> bool:
    """Whether a layer gives zero where its whole kernel lies outside of the image."""
    if isinstance(layer, nn.Linear):
        return False
    if layer.bias is not None and layer.bias.any():
        return False
    if any(layer.padding):
        return False
    return _is_a_point(layer)


def _is_a_point(layer: Conv) -> bool:
    return set(layer.kernel_size) == {1}


def parameters_of_product(first: WeightLayer, second: WeightLayer) -> int:
    """How many parameters the product of two layers has, without multiplying them."""
    entries = entries_of_product([first, second])
    if first.bias is None and second.bias is None:
        return entries
    outputs = len(second.weight)
    return entries + outputs


def entries_of_product(layers: Sequence[WeightLayer]) -> int:
    """How many weights layers would have as one, without multiplying them."""
    first = layers[0]
    last = layers[-1]
    outputs = len(last.weight)
    if isinstance(first, nn.Linear):
        inputs: int = first.weight.shape[1]
        return inputs * outputs
    convolutions = [layer for layer in layers if isinstance(layer, Conv)]
    groups = {layer.groups for layer in convolutions}
    seen = first.in_channels
    if len(groups) == 1:
        seen //= first.groups
    entries = seen * outputs
    axes = len(first.kernel_size)
    for axis in range(axes):
        length = _length(convolutions, axis)
        entries *= length
    return entries


def _length(layers: Sequence[Conv], axis: int) -> int:
    """How long the kernel of convolutions as one is along an axis."""
    wide = [layer for layer in layers if not _is_a_point(layer)]
    if not wide:
        return 1
    first_wide = wide[0]
    before = layers.index(first_wide)
    strides_before: set[int] = set()
    for layer in layers[:before]:
        strides_before.update(layer.stride)
    if len(wide) == 1 and strides_before <= {1}:
        # One that is dilated among pointwise ones stays so.
        return first_wide.kernel_size[axis]
    span = 1
    stride = 1
    for layer in layers:
        gaps = layer.kernel_size[axis] - 1
        reach = layer.dilation[axis] * gaps
        span += stride * reach
        stride *= layer.stride[axis]
    return span


def _product_of_linear(first: nn.Linear, second: nn.Linear) -> WeightLayer:
    inner = first.weight.double()
    outer = second.weight.double()
    weight = outer @ inner
    bias = _bias(first, outer, second.bias)
    return with_weights(second, weight, bias)


def _product_of_convolutions(first: Conv, second: Conv) -> WeightLayer:
    groups = 1
    if first.groups == second.groups:
        groups = first.groups
    inner = _in_groups(first, groups)
    outer = _in_groups(second, groups)
    over_positions = outer.flatten(3).sum(3)
    matrix = torch.block_diag(*over_positions)
    bias = _bias(first, matrix, second.bias)
    dilation = _common_dilation(first, second)
    if dilation is None:
        axes = len(first.stride)
        dilation = (1,) * axes
        steps = times(first.stride, second.dilation)
        inner = _spread(inner, first.dilation)
        outer = _spread(outer, steps)
    kernels = []
    for before, behind in zip(inner, outer, strict=True):
        kernel = _correlated(before, behind)
        kernels.append(kernel)
    weight = torch.cat(kernels)
    combined = with_weights(second, weight, bias)
    assert isinstance(combined, Conv)
    combined.groups = groups
    combined.in_channels = first.in_channels
    combined.dilation = dilation
    combined.stride = times(first.stride, second.stride)
    combined.padding = _padding(first, second)
    return combined


def times(some: PerAxis, others: PerAxis) -> PerAxis:
    """Entry by entry."""
    products = []
    for one, other in zip(some, others, strict=True):
        products.append(one * other)
    return tuple(products)


def plus(some: PerAxis, others: PerAxis) -> PerAxis:
    """Entry by entry."""
    sums = []
    for one, other in zip(some, others, strict=True):
        sums.append(one + other)
    return tuple(sums)


def _padding(first: Conv, second: Conv) -> PerAxis:
    """All of it, in front of the first layer."""
    in_front = times(first.stride, sizes(second.padding))
    return plus(sizes(first.padding), in_front)


def sizes(padding: str | PerAxis) -> PerAxis:
    """The padding of a layer that is in a run: there it is not given by a name."""
    assert not isinstance(padding, str)
    return padding


def _in_groups(layer: Conv, groups: int) -> Tensor:
    """Its kernels (groups, out, in, …), in float64; of one group where it has more, zero where an
    output does not see an input."""
    weight = layer.weight.double()
    if groups == layer.groups:
        grouped: Tensor = weight.unflatten(0, (groups, -1))
        return grouped
    assert groups == 1
    full = weight.new_zeros(layer.out_channels, layer.in_channels, *layer.kernel_size)
    parts = weight.chunk(layer.groups)
    outputs = full.chunk(layer.groups)
    for group, part in enumerate(parts):
        of_group = outputs[group]
        by_inputs = of_group.chunk(layer.groups, dim=1)
        seen = by_inputs[group]
        seen.copy_(part)
    return full.unsqueeze(0)


def _common_dilation(first: Conv, second: Conv) -> PerAxis | None:
    """The dilation that the product has where one of the two is a single point; None where zeros
    have to be written out between the entries of both."""
    if _is_a_point(second):
        return tuple(first.dilation)
    if not _is_a_point(first):
        return None
    strides = set(first.stride)
    if strides == {1}:
        return tuple(second.dilation)
    return None


def _spread(kernels: Tensor, steps: PerAxis) -> Tensor:
    """Kernels (groups, out, in, …) with `step` − 1 zeros between the entries of each axis."""
    for axis, step in enumerate(steps, start=3):
        shape = list(kernels.shape)
        size = shape[axis]
        entries = torch.arange(size, device=kernels.device)
        places = step * entries
        last_place = step * (size - 1)
        shape[axis] = last_place + 1
        zeros = kernels.new_zeros(shape)
        kernels = zeros.index_copy(axis, places, kernels)
    return kernels


def _correlated(inner: Tensor, outer: Tensor) -> Tensor:
    """The kernel (out, in, …) of correlating with `inner` (between, in, …), then with `outer` (out,
    between, …): the full convolution of the two."""
    sizes = inner.shape[2:]
    margin = [size - 1 for size in sizes]
    positions = list(range(2, inner.dim()))
    by_inputs = inner.transpose(0, 1)
    flipped = by_inputs.flip(positions)
    axes = len(sizes)
    convolve = _CONVOLVE[axes]
    full: Tensor = convolve(outer, flipped, padding=margin)
    return full


def _bias(first: WeightLayer, matrix: Tensor, bias: Tensor | None) -> Tensor | None:
    """`matrix` (out₂, out₁) times the first bias plus the second; None if there is neither."""
    if first.bias is None:
        return bias
    before = first.bias.double()
    moved = matrix @ before
    if bias is None:
        return moved
    return moved + bias.double()
