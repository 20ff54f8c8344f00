"""Weights that a network's own code computes from its parameters."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction import compact


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 in each row, times a gain (Qiao et al.
    2019, arXiv 1903.10520)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        scale = self.gain.view(-1) * 0.5
        weight = F.batch_norm(flat, None, None, scale, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class Scaled(nn.Module):
    """Reads one parameter in two places: of it, and of it times 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(F.linear(x, self.weight * 2).relu(), self.weight)))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (Standardised(3, 8), nn.ReLU(), Standardised(8, 12), nn.ReLU())
    made = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        for layer, gone in ((made[0], [1, 2, 5]), (made[2], [0, 7])):
            layer.weight[gone] = 0
            layer.bias[gone] = 0
    return made.eval()


def test_units_of_standardised_convolutions_go_and_the_outputs_stay() -> None:
    inputs = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    before = network()
    made = compact(before, inputs).network
    assert sum(p.numel() for p in made.parameters()) == 5 * 28 + 10 * (5 * 9 + 1) + 5 * 11
    torch.testing.assert_close(made(inputs), before(inputs), rtol=0, atol=1e-5)
    torch.testing.assert_close(made.train()(inputs), before(inputs), rtol=0, atol=1e-5)


def test_the_network_that_was_given_keeps_its_weights() -> None:
    before, same = network(), network()
    compact(before, torch.randn(4, 3, 10, 10))
    for (name, one), (other, two) in zip(
        before.named_parameters(), same.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two)


@pytest.mark.parametrize("count", [1, 4])
def test_a_parameter_that_is_read_elsewhere_too_stays_one(count: int) -> None:
    torch.manual_seed(0)
    before, inputs = Scaled().eval(), torch.randn(max(count, 2), 8)
    made = compact(before, inputs).network
    assert sum(p.numel() for p in made.parameters()) == 64 + 27
    torch.testing.assert_close(made(inputs[:count]), before(inputs[:count]))


def test_a_compact_network_of_computed_weights_can_be_pickled() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(6, 8)
    network = pickle.loads(pickle.dumps(compact(model, inputs).network))
    with torch.no_grad():
        assert torch.allclose(network(inputs), model(inputs), atol=1e-6)
