"""Which whole layers can be taken out, and what is left then."""

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import Without, take_out, whole_layers
from slimfront.trainables.measures.measure import measure
from tests.trainables.networks import Transformer, damage_batch_norms


class Several(nn.Module):
    """A residual block with ReLUs in place, a convolution between activations, one that changes
    the shape, and two linear layers that can merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.one, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.same, self.same_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.two(self.relu(self.norm(self.one(x)))))
        x = self.relu(self.same_norm(self.same(x)))
        x = self.relu(self.down(x)).mean((2, 3))
        out: Tensor = self.head(nn.functional.gelu(self.hidden(x)))
        return out


@pytest.fixture
def network() -> nn.Module:
    made = Several().eval()
    damage_batch_norms(made)
    return made


def test_branches_layers_of_one_shape_and_layers_that_merge_are_found(network: nn.Module) -> None:
    graph = traced_in_both_modes(network, torch.randn(4, 1, 8, 8))
    found = {each.name: each.what for each in whole_layers(graph, torch.randn(4, 1, 8, 8))}
    assert set(found) == {"one", "two", "same", "hidden"}
    assert found["two"].startswith("the residual branch")
    assert found["same"].startswith("the layer")
    assert "merges" in found["hidden"]


@pytest.mark.parametrize("name", ["one", "two", "same", "hidden"])
def test_what_was_tried_is_what_is_left_and_compaction_has_that_many_layers_less(
    network: nn.Module, name: str
) -> None:
    x = torch.randn(4, 1, 8, 8)
    graph = traced_in_both_modes(network, x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = next(each for each in whole_layers(graph, x) if each.name == name)
    with torch.no_grad():
        tried = Without(graph, chosen).run(x.clone())
        take_out(graph, chosen)
        assert torch.allclose(graph(x.clone()), tried, atol=1e-6)
        made = compact(graph, x)
        assert torch.allclose(made.network(x), tried, atol=1e-5)
    gone = 2 if name == "two" else 1
    assert made.report.after["layers"] == measure(network, x)["layers"] - gone
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_all_that_can_go_goes_one_by_one() -> None:
    network = Transformer().eval()
    x = torch.randn(4, 1, 8, 8)
    graph = traced_in_both_modes(network, x)
    gone = 0
    while found := whole_layers(graph, x):
        take_out(graph, found[0])
        gone += 1
        with torch.no_grad():
            assert graph(x).shape == (4, 10)
    assert gone >= 2
    assert compact(graph, x).report.after["layers"] == 2  # embed and head


def test_a_layer_that_is_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            x = torch.relu(self.same(torch.relu(self.same(x))))
            out: Tensor = self.last(x)
            return out

    x = torch.randn(4, 4)
    graph = traced_in_both_modes(Twice(), x)
    assert "same" not in {each.name for each in whole_layers(graph, x)}
