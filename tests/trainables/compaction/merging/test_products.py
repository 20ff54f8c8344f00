"""Products of two layers: equal to the two, in float64 and float32, whatever their kernels,
strides, paddings, dilations and groups."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.layers import count_weights
from slimfront.trainables.compaction.merging.products import (
    entries_of_product,
    parameters_of_product,
    product,
)
from slimfront.trainables.measures.measure import measure

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def apart(first: Any, second: Any, combined: Any, inputs: torch.Tensor) -> float:
    """The largest difference, relative to the largest output."""
    with torch.no_grad():
        expected = second(first(inputs))
        actual = combined(inputs)
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, Any, torch.Tensor]:
    """Two convolutions that may follow each other, the second without padding, and inputs."""
    axes = draw(st.integers(1, 3))
    kind = CONVOLUTIONS[axes]
    sizes = st.lists(st.integers(1, 3), min_size=axes, max_size=axes).map(tuple)
    few = st.lists(st.integers(1, 2), min_size=axes, max_size=axes).map(tuple)
    none = st.lists(st.integers(0, 2), min_size=axes, max_size=axes).map(tuple)
    groups = [draw(st.sampled_from([1, 2, 4])) for _ in range(2)]
    channels = [4 * draw(st.integers(1, 2)) for _ in range(3)]

    def layer(at: int, padding: tuple[int, ...]) -> Any:
        return kind(
            channels[at],
            channels[at + 1],
            draw(sizes),
            stride=draw(few),
            padding=padding,
            dilation=draw(few),
            groups=groups[at],
            bias=draw(st.booleans()),
        )

    torch.manual_seed(draw(st.integers(0, 2**16)))
    first = layer(0, draw(none))
    second = layer(1, (0,) * axes)
    inputs = torch.randn(2, channels[0], *[draw(st.integers(13, 15)) for _ in range(axes)])
    return first.eval(), second.eval(), inputs


@settings(max_examples=60)
@given(pairs())
def test_two_convolutions_are_one_where_the_second_has_no_padding(
    drawn: tuple[Any, Any, torch.Tensor],
) -> None:
    first, second, inputs = drawn
    combined = product(first, second)
    assert combined is not None
    assert entries_of_product([first, second]) == combined.weight.numel()
    assert parameters_of_product(first, second) == count_weights(combined)
    assert apart(first, second, combined, inputs) < 1e-5
    exact = product(first.double(), second.double())
    assert exact is not None
    assert apart(first, second, exact, inputs.double()) < 1e-10


def test_a_pointwise_layer_without_bias_goes_into_a_padded_one_exactly() -> None:
    first = nn.Conv2d(3, 6, 1, stride=2, bias=False).double()
    second = nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2).double()
    combined = product(first, second)
    assert combined is not None
    for size in (8, 9, 10, 11):
        inputs = torch.randn(2, 3, size, size).double()
        assert apart(first, second, combined, inputs) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_padding_between_two_layers_is_refused_and_may_be_moved(bias: bool) -> None:
    first = nn.Conv2d(3, 6, 3, padding=1, bias=bias).double()
    second = nn.Conv2d(6, 4, 3, padding=1).double()
    assert product(first, second) is None
    combined = product(first, second, moves_padding=True)
    assert combined is not None
    inputs = torch.randn(2, 3, 9, 9).double()
    with torch.no_grad():
        expected, actual = second(first(inputs)), combined(inputs)
        inner = slice(1, -1)
        assert torch.allclose(expected[..., inner, inner], actual[..., inner, inner])
        assert not torch.allclose(expected, actual)
        # It is what the two give if all padding stands in front.
        first.padding, second.padding = (2, 2), (0, 0)
        assert torch.allclose(second(first(inputs)), actual)


def test_depthwise_layers_stay_depthwise() -> None:
    first = nn.Conv2d(6, 6, 3, groups=6)
    second = nn.Conv2d(6, 6, 3, groups=6)
    combined = product(first, second)
    assert isinstance(combined, nn.Conv2d)
    assert (combined.groups, combined.kernel_size) == (6, (5, 5))
    assert combined.weight.shape == (6, 1, 5, 5)


def test_layers_of_different_kinds_and_paddings_by_other_than_zeros_do_not_merge() -> None:
    assert product(nn.Linear(3, 3), nn.Conv2d(3, 3, 1)) is None
    assert product(nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 1)) is None
    around = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    assert product(around, nn.Conv2d(3, 3, 1)) is None
    assert product(nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 1)) is None


def test_grouped_layers_with_nothing_between_them_are_one_after_compaction() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 24, 1, groups=2), nn.Dropout(), nn.Conv2d(24, 4, 3, groups=4), nn.ReLU()
    ).eval()
    inputs = torch.randn(4, 4, 9, 9)
    made = compact(network, inputs)
    assert made.report.after["layers"] == 1
    assert made.report.after["flops"] < measure(network, inputs)["flops"]
    assert apart(nn.Identity(), network, made.network, inputs) < 1e-5
