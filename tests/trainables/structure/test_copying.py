"""Copies of networks."""

import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.structure.copying import copied


class Caching(nn.Module):
    """Keeps what it computed of its parameters, by the device, while it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.ones(4))
        self.kept: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(self.bias.device)
        if key not in self.kept:
            self.kept[key] = [self.bias * 3]
        return self.layer(x).relu() + self.kept[key][0]


def test_what_a_module_has_computed_is_copied_by_its_values() -> None:
    network = Caching().eval()
    inputs = torch.randn(3, 4)
    wanted = network(inputs)
    twin = copied(network)
    assert torch.equal(twin.kept["cpu"][0], torch.full((4,), 3.0))
    assert twin.kept["cpu"][0] is not network.kept["cpu"][0]
    assert twin.bias is not network.bias
    assert torch.equal(twin(inputs), wanted)


def test_a_network_that_keeps_what_it_computed_is_made_compact() -> None:
    network = Caching().eval()
    inputs = torch.randn(3, 4)
    wanted = network(inputs)
    torch.testing.assert_close(compact(network, inputs).network(inputs), wanted)
    assert list(network.kept) == ["cpu"]
    assert torch.equal(network(inputs), wanted)


def test_parameters_that_modules_share_are_shared_in_the_copy() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    twin = copied(nn.Sequential(one, other))
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not one.weight
