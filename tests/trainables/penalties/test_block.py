"""Block sparsity: what becomes of a branch that was zeroed while the network goes on training."""

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.models.resnet import BasicBlock


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
