"""Which layers go where a target says how small a network is to be."""

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import take_out
from slimfront.trainables.depth.base import Batch
from slimfront.trainables.depth.removal import Asked, found_again, without_layers, worth_least
from slimfront.trainables.depth.target import Target
from slimfront.trainables.measures.measure import measure

X = torch.randn(32, 8)
CHEAP = 3


class Block(nn.Module):
    def __init__(self, hidden: int, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.norm = nn.LayerNorm(8)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.down(torch.relu(self.up(x))))
        return out


class Blocks(nn.Module):
    """Blocks that add little and have few weights, and one that adds more, and has most of them."""

    def __init__(self) -> None:
        super().__init__()
        cheap = [Block(2, 0.01 * (1 + place)) for place in range(CHEAP)]
        self.blocks = nn.Sequential(*cheap, Block(60, 0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


def asked(params: int) -> Asked:
    return Asked(count=0, words="depth", target=Target(params=params))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


def test_what_a_target_is_met_without_is_put_back(network: nn.Module) -> None:
    """The cheap blocks are worth least, and go first, for nothing."""
    without, steps = without_layers(network, [Batch(X)], asked(500))
    assert {name.split(".")[1] for name, _, _ in steps} == {str(CHEAP)}
    assert measure(without, X)["params"] <= 500
    without, steps = without_layers(network, [Batch(X)], asked(230))
    assert measure(without, X)["params"] <= 230
    assert 1 < len(steps) < CHEAP + 1


@pytest.mark.parametrize("merging", [True, False])
def test_what_was_chosen_is_found_again(network: nn.Module, merging: bool) -> None:
    graph = traced_in_both_modes(network, X)
    before = str(graph.graph)
    steps = worth_least(graph, [Batch(X)], asked(230), None, merging=merging)
    assert str(graph.graph) == before
    for layer, step in zip(found_again(graph, X, steps), steps, strict=True):
        assert layer.name == step[0]
        take_out(graph, layer, merging=merging)
    assert measure(compact(graph, X).network, X)["params"] <= 230
    with pytest.raises(LookupError, match="nowhere"):
        list(found_again(graph, X, [("nowhere", "pruned", "")]))
