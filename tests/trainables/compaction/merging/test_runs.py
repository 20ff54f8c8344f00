"""Runs of layers that become one when the activations between them go."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from slimfront.trainables.compaction import Compaction, compact
from slimfront.trainables.compaction.layers import count_weights
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import WholeLayer, take_out, whole_layers
from tests.trainables.networks import damage_batch_norms


class Inverted(nn.Module):
    """A stem, and an inverted residual block without a shortcut behind it."""

    def __init__(self, stride: int = 1, kernel: int = 3, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        inner, outer = 96, 20
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.before = act()
        self.expand = nn.Conv2d(16, inner, 1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.one = act()
        self.depthwise = nn.Conv2d(
            inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False
        )
        self.norm_two = nn.BatchNorm2d(inner)
        self.two = act()
        self.project = nn.Conv2d(inner, outer, 1, bias=False)
        self.norm_three = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x))
        x = self.one(self.norm(self.expand(x)))
        x = self.two(self.norm_two(self.depthwise(x)))
        out: Tensor = self.norm_three(self.project(x))
        return out


def made(network: nn.Module) -> nn.Module:
    damage_batch_norms(network)
    return network.double().eval()


def run_of(graph: fx.GraphModule, x: Tensor) -> WholeLayer:
    found = [layer for layer in whole_layers(graph, x) if layer.merges is not None]
    (run,) = [layer for layer in found if layer.name == "expand"]
    return run


def with_padding_in_front(network: Inverted) -> Inverted:
    """What is to come out: no activation within, and all padding before the first layer."""
    other = copy.deepcopy(network)
    other.expand.padding, other.depthwise.padding = other.depthwise.padding, (0, 0)
    other.one = other.two = nn.Identity()  # type: ignore[assignment]
    return other


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_an_inverted_residual_block_becomes_one_convolution(
    stride: int, act: type[nn.Module]
) -> None:
    network = made(Inverted(stride, act=act))
    x = torch.randn(4, 3, 9, 9).double()
    graph = traced_in_both_modes(network, x)
    found = run_of(graph, x)
    assert found.name == "expand"
    assert found.what == (
        "the activations between it and 'project', so that these become one layer, with the "
        "padding in front of it"
    )
    take_out(graph, found)
    convolutions = [m for m in graph.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 2
    assert convolutions[1].kernel_size == (3, 3)
    assert count_weights(graph) < count_weights(network)
    assert isinstance(network, Inverted)
    expected = with_padding_in_front(network)(x)
    assert torch.allclose(graph(x), expected, rtol=1e-10, atol=1e-10)


def test_what_would_cost_more_as_one_stays() -> None:
    """Of a kernel of 7 × 7 the product has more weights than the three layers."""
    network = made(Inverted(kernel=7))
    x = torch.randn(4, 3, 9, 9).double()
    graph = traced_in_both_modes(network, x)
    found = [layer for layer in whole_layers(graph, x) if layer.merges is not None]
    assert "expand" not in {layer.name for layer in found}


@torch.no_grad()
def test_layers_with_nothing_between_them_are_one_where_no_two_of_them_are() -> None:
    """An expansion and a depthwise convolution cost more as one than apart; with the projection
    behind them, all three cost less."""
    linear = with_padding_in_front(made(Inverted()))  # type: ignore[arg-type]
    x = torch.randn(4, 3, 9, 9).double()
    made_compact = compact(linear, x)
    merged = [step for step in made_compact.report.steps if step[1] == "merged"]
    assert merged == [
        ("expand", "merged", "into 'project'"),
        ("depthwise", "merged", "into 'project'"),
    ]
    assert count_weights(made_compact.network) < count_weights(linear)
    assert torch.allclose(made_compact.network(x), linear(x), rtol=1e-10, atol=1e-10)
    apart = compact(linear, x, Compaction(merge="never")).network
    assert len([m for m in apart.modules() if isinstance(m, nn.Conv2d)]) == 4
    padded = compact(made(Inverted(act=nn.Identity)), x).network
    assert len([m for m in padded.modules() if isinstance(m, nn.Conv2d)]) == 4


@st.composite
def chains(draw: st.DrawFn) -> nn.Sequential:
    """Convolutions of any kernels, strides, paddings and groups, with norms and activations."""
    layers: list[nn.Module] = []
    channels = 4
    for _ in range(draw(st.integers(2, 4))):
        width = draw(st.sampled_from([4, 8, 24]))
        groups = draw(st.sampled_from([1, 2, 4]))
        kernel = draw(st.sampled_from([1, 1, 3]))
        padding = draw(st.integers(0, 1))
        stride = draw(st.sampled_from([1, 1, 2]))
        layers.append(
            nn.Conv2d(
                *(channels, width, kernel, stride, padding),
                groups=groups,
                bias=draw(st.booleans()),
            )
        )
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(width))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.SiLU(), nn.Identity()])))
        channels = width
    return nn.Sequential(*layers)


@settings(max_examples=40)
@given(chains(), st.integers(0, 2**16))
@torch.no_grad()
def test_runs_of_any_chain_are_what_their_layers_are_without_activations(
    chain: nn.Sequential, seed: int
) -> None:
    torch.manual_seed(seed)
    network = made(chain)
    x = torch.randn(2, 4, 17, 17).double()
    graph = traced_in_both_modes(network, x)
    while found := [layer for layer in whole_layers(graph, x) if layer.merges is not None]:
        expected = _in_front(graph, found[0])(x)
        take_out(graph, found[0])
        assert torch.allclose(graph(x), expected, rtol=1e-9, atol=1e-9)


def _in_front(graph: fx.GraphModule, layer: WholeLayer) -> fx.GraphModule:
    """A copy of the network without the activations of a run, whose padding is all before its first
    layer."""
    other = copy.deepcopy(graph)
    copies = {node.name: node for node in other.graph.nodes}
    for node, source in layer.passes.items():
        copies[node.name].replace_all_uses_with(copies[source.name])
        other.graph.erase_node(copies[node.name])
    other.recompile()
    assert layer.merges is not None
    if layer.merges.moves_padding:
        _move_padding(other, [each.name for each in layer.merges.layers])
    return other


def _move_padding(graph: fx.GraphModule, names: list[str]) -> None:
    padding, stride = 0, 1
    convolutions = [graph.get_submodule(name) for name in names]
    for each in convolutions:
        assert isinstance(each, nn.Conv2d)
        assert not isinstance(each.padding, str)
        padding += stride * each.padding[0]
        stride *= each.stride[0]
        each.padding = (0, 0)
    first = convolutions[0]
    assert isinstance(first, nn.Conv2d)
    first.padding = (padding, padding)
