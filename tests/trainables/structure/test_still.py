"""Channels that are always 0 behind a batch norm without factors."""

import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.structure.targets.still import stilled

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        made: Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return made


def test_they_go() -> None:
    network = Plain()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    steps = 30
    sparsifier = {"name": "channels", "sparsity": 0.5, "of": "channels"}
    with sf.Slimming(network, optimizer, IMAGES, steps=steps, sparsifier=sparsifier) as slim:
        for _ in range(steps):
            optimizer.zero_grad()
            (network(IMAGES).square().mean() + slim.loss()).backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        small = slim.compact(IMAGES)
    alive = int(network.first.weight.flatten(1).any(1).sum())
    assert alive < 16
    assert small.network.get_submodule("first").out_channels == alive
    wanted = stilled(network.eval(), IMAGES)(IMAGES)
    torch.testing.assert_close(small.network(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_only_what_has_such_channels_is_copied() -> None:
    network = Plain().eval()
    network.norm.running_mean.normal_()
    assert stilled(network, IMAGES) is network
    with torch.no_grad():
        network.first.weight[3] = 0
    assert stilled(network, IMAGES) is network  # its bias is left
    with torch.no_grad():
        network.first.bias[3] = 0
    made = stilled(network, IMAGES)
    assert made is not network
    assert made.norm.running_mean[3] == 0
    assert network.norm.running_mean[3] != 0
    others = [channel for channel in range(16) if channel != 3]
    assert torch.equal(made.norm.running_mean[others], network.norm.running_mean[others])
    factors = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert stilled(factors, IMAGES) is factors
