"""Block sparsity: what becomes of a branch that was zeroed while the network goes on training."""

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.penalties.block import BlockSparsity


class PreNorm(nn.Module):
    """The MLP branch of a transformer, whose last layer has no norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return made


BRANCHES = {
    "convolutions with norms": (
        BasicBlock(8, 8, 1),
        torch.randn(32, 8, 6, 6, generator=torch.Generator().manual_seed(0)),
    ),
    "a transformer's": (
        PreNorm(),
        torch.randn(32, 8, generator=torch.Generator().manual_seed(0)),
    ),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_that_was_zeroed_comes_back_where_the_loss_wants_it(kind: str) -> None:
    """Its group has a gradient while it is 0, unlike the layers in front of it: it comes back when
    that is larger than the strength."""
    block, inputs = BRANCHES[kind]
    torch.manual_seed(0)
    network = nn.Sequential(block, nn.Flatten(), nn.Linear(inputs[0].numel(), 1))
    wanted = 10 * inputs.square().flatten(1).mean(1, keepdim=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    norms = []
    with sf.Slimming(
        network, optimizer, inputs, steps=80, penalties={"block": {"strength": 1.0}}
    ) as slim:
        (penalty,) = slim.acting.penalties
        (branch,) = penalty.groups.values()
        for step in range(80):
            penalty.options = penalty.options.model_copy(
                update={"strength": 200.0 if step < 20 else 0.01}
            )
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs), wanted).backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
            norms.append(float(penalty.norm(branch)))
    assert norms[19] == 0
    assert norms[-1] > 0


class Timed(nn.Module):
    """A residual block whose branch is told a time, of which one number is for all places."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Conv2d(8, 8, 1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(x.mean((2, 3), keepdim=True))
        made: Tensor = x + self.last((self.two(self.one(x).relu()) + time).relu())
        return made


def test_what_is_added_to_one_number_for_all_places_is_no_branch() -> None:
    """It could not be taken out: the sum would have no places."""
    active = BlockSparsity(strength=2.0).attach(Timed(), torch.randn(2, 8, 6, 6))
    assert set(active.groups) == {"last"}
    active.close()


def test_branches_are_weighed_by_what_they_cost() -> None:
    """Of two branches whose convolutions have 8 and 16 channels, at images of 8 × 8 and 4 × 4."""
    network = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
    images = torch.randn(2, 8, 8, 8)
    found = {}
    for cost in ("none", "flops", "params"):
        active = BlockSparsity(strength=2.0, cost=cost).attach(network, images)
        found[cost] = active.strengths(active.options)
        assert found[cost] == [active.strength(name) for name in active.groups]
        active.close()
    assert found["none"] == [2.0, 2.0, 2.0]
    # Roots of 2 · 8, 2 · 16 and 2 · 16 numbers; weights of two convolutions with their norms.
    sizes = torch.tensor([16.0, 32.0, 32.0]).sqrt()
    params = torch.tensor([2 * (576 + 16.0), 1152 + 2304 + 64.0, 2 * (2304 + 32.0)])
    flops = torch.tensor([2 * 576 * 64.0, (1152 + 2304) * 16.0, 2 * 2304 * 16.0])
    for cost, costs in (("params", params), ("flops", flops)):
        wanted = 2 * sizes / sizes.mean() * costs / costs.mean()
        torch.testing.assert_close(torch.tensor(found[cost]), wanted)
