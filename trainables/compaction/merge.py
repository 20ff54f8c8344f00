"""Layer merging: an inactive layer's ReLU does nothing, so the layer becomes part of the next one
(arXiv 2006.15604)."""

from collections import Counter
from typing import Literal

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.layers import (
    bypass,
    is_denser,
    is_larger,
    nonnegative_when_trained,
    set_called,
    with_weights,
)
from slimfront.trainables.structure.graph import (
    Conv,
    WeightLayer,
    call_counts,
    is_relu,
    module_of,
    only_user,
    weight_layer,
)

MergePolicy = Literal["always", "smaller", "never"]


def drop_idle_relus(graph: fx.GraphModule) -> list[str]:
    """Takes out every ReLU whose input is non-negative for every input of the network. Returns what
    fed them, by name."""
    nonnegative = nonnegative_when_trained(graph)
    dropped = []
    for node in list(graph.graph.nodes):
        if not is_relu(graph, node):
            continue
        source = node.args[0]
        if source not in nonnegative:
            continue
        name = source.name
        if source.op == "call_module":
            name = str(source.target)
        dropped.append(name)
        bypass(graph, node)
    return dropped


def merge_layers(
    graph: fx.GraphModule, policy: MergePolicy, *, approximate: bool = False
) -> tuple[list[str], list[str]]:
    """Replaces a layer that feeds only another layer by their product, where that is exact, as the
    policy says.

    Linear layers always merge exactly. Convolutions do if one of the two is 1×1 and no padding lies
    between them (see `product`). Convolutions merge only where the product has at most as many
    weights as the two layers, whatever the policy.

    Args:
        policy: "always", for the fewest layers; "smaller", only where the product has at most as
            many weights, and as many non-zero ones, as the two layers (the product of sparse
            matrices is denser than they are, and that of a bottleneck larger); or "never".
        approximate: whether convolutions also merge where only the border of the image comes out
            differently.

    Returns:
        Names of the layers that went into the next one, and of those that could have, but would
        have cost more.
    """
    merged: list[str] = []
    kept: list[str] = []
    if policy == "never":
        return merged, kept
    counts = call_counts(graph)
    for node in list(graph.graph.nodes):
        following = _next_layer(graph, node, counts)
        first = weight_layer(graph, node)
        second = weight_layer(graph, following)
        if following is None or first is None or second is None:
            continue
        combined = product(first, second)
        if combined is None and approximate:
            combined = product_but_for_the_border(first, second)
        if combined is None:
            continue
        name = str(node.target)
        if _costs_more(combined, first, second, policy):
            kept.append(name)
            continue
        set_called(graph, following, combined)
        bypass(graph, node)
        merged.append(name)
    return merged, kept


def _costs_more(
    combined: WeightLayer, first: WeightLayer, second: WeightLayer, policy: MergePolicy
) -> bool:
    """Whether the product of two layers has more weights than the policy allows."""
    larger = is_larger(combined, first, second)
    if policy == "smaller":
        return larger or is_denser(combined, first, second)
    return larger and isinstance(combined, Conv)


@torch.no_grad()
def product(first: WeightLayer, second: WeightLayer) -> WeightLayer | None:
    """The layer x ↦ second(first(x)), multiplied in float64; None where no single layer does that
    exactly.

    Linear: W = W₂W₁ (out₂, in₁), b = W₂b₁ + b₂. Convolution followed by a 1×1 without padding: the
    same over channels at each position of the kernel, with the strides multiplied. A 1×1 of stride
    1 without padding, followed by a convolution: the same, if that one has no padding or the first
    no bias; its zero padding would stand where the first layer's bias belongs.
    """
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return _product_of_linear(first, second)
    if not isinstance(first, Conv) or not isinstance(second, Conv):
        return None
    if first.weight.dim() != second.weight.dim():
        return None
    if not _pads_zeros(first) or not _pads_zeros(second):
        return None
    if _is_pointwise(second):
        return _with_pointwise_behind(first, second)
    if not _is_pointwise(first):
        return None
    if set(first.stride) != {1}:
        return None
    if any(second.padding) and _has_bias(first):
        return None
    return _with_pointwise_before(first, second)


def _has_bias(layer: Conv) -> bool:
    """Whether it has a bias that is not 0."""
    if layer.bias is None:
        return False
    return bool(layer.bias.any())


def _product_of_linear(first: nn.Linear, second: nn.Linear) -> WeightLayer:
    matrix = second.weight.double()
    return with_weights(
        like=second,
        weight=matrix @ first.weight.double(),
        bias=_combined_bias(first, matrix, second.bias),
    )


def _with_pointwise_behind(first: Conv, second: Conv) -> WeightLayer:
    matrix = second.weight.double().flatten(1)
    kernels = first.weight.double()
    combined = with_weights(
        like=first,
        weight=torch.einsum("om,mi...->oi...", matrix, kernels),
        bias=_combined_bias(first, matrix, second.bias),
    )
    assert isinstance(combined, Conv)
    strides = []
    for one, other in zip(first.stride, second.stride, strict=True):
        strides.append(one * other)
    combined.stride = tuple(strides)
    return combined


def _with_pointwise_before(first: Conv, second: Conv) -> WeightLayer:
    matrix = first.weight.double().flatten(1)
    kernels = second.weight.double()
    over_positions = kernels.flatten(2).sum(2)
    return with_weights(
        like=second,
        weight=torch.einsum("om...,mi->oi...", kernels, matrix),
        bias=_combined_bias(first, over_positions, second.bias),
    )


def _pads_zeros(layer: Conv) -> bool:
    """Whether it pads by zeros, by numbers that are given."""
    if isinstance(layer.padding, str):
        return False
    return layer.padding_mode == "zeros"


def _is_pointwise(layer: Conv) -> bool:
    """Whether it is 1×1 without padding."""
    if any(layer.padding):
        return False
    return set(layer.kernel_size) == {1}


@torch.no_grad()
def product_but_for_the_border(first: WeightLayer, second: WeightLayer) -> nn.Conv2d | None:
    """Two convolutions as one of kernel k₁ + k₂ − 1 and padding p₁ + p₂; None where that is not
    even nearly so.

    In the interior it is exact; at the border the second one's padding stood for zeros where the
    product sees what the first one makes of its own padding. The first must have stride 1, and
    neither a dilation.
    """
    if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d):
        return None
    if first.stride != (1, 1):
        return None
    for layer in (first, second):
        if layer.dilation != (1, 1):
            return None
        if not _pads_zeros(layer):
            return None
    # Correlating with W₁ and then with W₂ is correlating with the full convolution of the two
    # kernels.
    margin = [size - 1 for size in first.kernel_size]
    first_kernels = first.weight.double()
    flipped = first_kernels.transpose(0, 1).flip(2, 3)
    kernels = second.weight.double()
    matrix = kernels.sum((2, 3))
    combined = with_weights(
        like=second,
        weight=nn.functional.conv2d(kernels, flipped, padding=margin),
        bias=_combined_bias(first, matrix, second.bias),
    )
    assert isinstance(combined, nn.Conv2d)
    before, behind = first.padding, second.padding
    assert not isinstance(before, str) and not isinstance(behind, str)
    paddings = []
    for one, other in zip(before, behind, strict=True):
        paddings.append(one + other)
    combined.padding = tuple(paddings)
    return combined


def _combined_bias(first: WeightLayer, matrix: Tensor, bias: Tensor | None) -> Tensor | None:
    """`matrix` (out₂, out₁) times the first bias plus the second; None if there is neither."""
    if first.bias is None:
        return bias
    moved: Tensor = matrix @ first.bias.double()
    if bias is None:
        return moved
    return moved + bias.double()


def _next_layer(graph: fx.GraphModule, node: fx.Node, counts: Counter[object]) -> fx.Node | None:
    """The layer node that alone reads this layer node's output, seen through nodes that pass it on
    unchanged."""
    if weight_layer(graph, node) is None:
        return None
    if counts[node.target] > 1:
        return None
    reader = only_user(node)
    while isinstance(module_of(graph, reader), nn.Identity | nn.Dropout):
        assert reader is not None
        reader = only_user(reader)
    if reader is None or weight_layer(graph, reader) is None:
        return None
    if counts[reader.target] > 1:
        return None
    return reader
