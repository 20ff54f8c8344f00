"""Batch norms of grouped and transposed convolutions, and norms without factors, go into the
layers in front of them."""

from typing import Any

import pytest
import torch
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.measure import measure
from tests.trainables.networks import damage_batch_norms

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, NORMS)]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_norm_behind_any_convolution_is_folded(
    axes: int, groups: int, affine: bool, transposed: bool
) -> None:
    kind: Any = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    network = nn.Sequential(
        kind(4, 8, 3, groups=groups, bias=affine),
        NORMS[axes - 1](8, affine=affine),
        nn.ReLU(),
        kind(8, 8, 3, groups=8),
        NORMS[axes - 1](8),
    ).eval()
    damage_batch_norms(network)
    inputs = torch.randn(4, 4, *([7] * axes))
    made = compact(network, inputs)
    assert not norms_of(made.network)
    with torch.no_grad():
        assert torch.allclose(made.network(inputs), network(inputs), atol=1e-5)
    assert made.report.after["params"] <= measure(network, inputs)["params"]
    assert ("3", "folded", "batch norm") in made.report.steps


def test_a_norm_of_what_others_read_too_or_of_a_layer_called_twice_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.read = nn.Conv2d(4, 4, 3, padding=1, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.twice(self.twice(x)))
            y = self.read(x)
            out: torch.Tensor = y + self.other(y)
            return out

    network = Shared().eval()
    damage_batch_norms(network)
    inputs = torch.randn(4, 4, 6, 6)
    made = compact(network, inputs)
    with torch.no_grad():
        assert torch.allclose(made.network(inputs), network(inputs), atol=1e-5)
    assert len(norms_of(made.network)) == 2
