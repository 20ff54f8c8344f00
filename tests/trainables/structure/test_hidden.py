"""Layers whose units can be removed one by one, whatever activation follows."""

import pytest
import torch
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.penalties.node import NodeSparsity
from slimfront.trainables.structure.targets.layers import hidden_layers, inner_layers
from slimfront.trainables.structure.tracing.trace import trace

ROWS = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))


def pair(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.LayerNorm(12), nn.Linear(12, 20), activation, nn.Dropout(0.1), nn.Linear(20, 12))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.ReLU6(), nn.Sigmoid()])
def test_units_of_a_pair_of_linear_layers_are_zeroed_and_go(activation: nn.Module) -> None:
    network = pair(activation)
    with torch.no_grad():
        network[1].weight[[2, 5, 7]] *= 1e-4
        network[1].bias[[2, 5, 7]] *= 1e-4
    active = NodeSparsity(strength=1.0).attach(network, ROWS)
    assert list(active.groups) == ["1"]
    active.proximal(0.01)
    assert network[1].weight.any(1).tolist() == [n not in (2, 5, 7) for n in range(20)]
    outputs = network(ROWS)
    made = compact(network, ROWS).network
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert (shapes["1.weight"], shapes["4.weight"]) == ((17, 12), (12, 17))
    torch.testing.assert_close(made(ROWS), outputs, rtol=1e-4, atol=1e-5)


def test_what_mixes_units_hides_none() -> None:
    assert hidden_layers(trace(pair(nn.Softmax(-1)), ROWS)) == []


@pytest.mark.parametrize(("activation", "padding"), [(nn.Sigmoid(), 0), (nn.Softplus(), 1)])
def test_what_makes_something_of_zeros_hides_none_in_front_of_a_convolution(
    activation: nn.Module, padding: int
) -> None:
    """Padding would be 0, and what stands beside it is not."""
    last = nn.Conv2d(8, 4, 3, padding=padding)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), activation, last)
    assert hidden_layers(trace(network, torch.randn(2, 3, 8, 8))) == []


def test_units_that_a_depthwise_convolution_reads_are_left_to_the_channel_penalty() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
    )
    assert hidden_layers(trace(network, torch.randn(2, 3, 8, 8))) == []


def test_inner_layers_stand_between_relus_alone() -> None:
    def network(activation: nn.Module) -> nn.Module:
        return nn.Sequential(
            nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), activation, nn.Linear(8, 2)
        )

    found = [
        [layer.name for layer in inner_layers(trace(network(a)))] for a in (nn.ReLU(), nn.GELU())
    ]
    assert found == [["2"], []]
