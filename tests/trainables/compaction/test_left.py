"""Zero units of every kind of convolution, and of subclasses of layers, are removed; what is left
of them is named."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.shipping.network_file import check_storable


class SameConv(nn.Conv2d):
    """A subclass that changes nothing."""


class PaddedConv(nn.Conv2d):
    """A subclass with code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class NormReLU(nn.BatchNorm2d):
    """A subclass with code of its own that calls that of its base."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def images(axes: int) -> Tensor:
    return torch.randn(16, 3, *[6] * axes, generator=torch.Generator().manual_seed(1))


def kill(*layers: nn.Module) -> None:
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter[[1, 4]] = 0


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in network.parameters() if p.dim() > 2]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_zero_channels_of_convolutions_go_whatever_they_are_over(axes: int) -> None:
    torch.manual_seed(0)
    conv, norm, pool = (getattr(nn, f"{kind}{axes}d") for kind in ("Conv", "BatchNorm", "MaxPool"))
    model = nn.Sequential(
        conv(3, 6, 3), norm(6), nn.ReLU(), pool(2), conv(6, 4, 2), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    kill(model[0], model[1])
    result = compact(model, images(axes))
    assert shapes(result.network) == [(4, 3, *[3] * axes), (4, 4, *[2] * axes)]
    assert not [module for module in result.network.modules() if isinstance(module, norm)]
    torch.testing.assert_close(result.network(images(axes)), model(images(axes)))
    stored = deserialise(serialise(result.network))  # type: ignore[arg-type]
    assert torch.equal(stored(images(axes)), result.network(images(axes)))


@pytest.mark.parametrize("axes", [1, 3])
def test_channels_that_such_convolutions_share_go_together(axes: int) -> None:
    conv = getattr(nn, f"Conv{axes}d")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = (
                conv(3, 6, 3, padding=1),
                conv(6, 6, 3, padding=1),
                nn.Linear(6, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out: Tensor = self.head(torch.relu(x + self.branch(x)).flatten(2).mean(2))
            return out

    torch.manual_seed(0)
    model = Residual().eval()
    kill(model.stem, model.branch)
    result = compact(model, images(axes))
    assert shapes(result.network) == [(4, 3, *[3] * axes), (4, 4, *[3] * axes)]
    torch.testing.assert_close(result.network(images(axes)), model(images(axes)))


@pytest.mark.parametrize("conv", [SameConv, PaddedConv])
def test_zero_channels_of_subclasses_go_and_they_can_be_stored(conv: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6, 3), NormReLU(6), conv(6, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    model(images(2))
    model.eval()
    kill(model[0], model[1])
    check_storable(model, images(2))
    result = compact(model, images(2))
    assert shapes(result.network) == [(4, 3, 3, 3), (4, 4, 3, 3)]
    assert result.report.count("folded") == 1
    torch.testing.assert_close(result.network(images(2)), model(images(2)))


def test_zero_units_that_stay_are_named_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.Softmax(-1), nn.Linear(6, 5)).eval()
    kill(model[1])
    with caplog.at_level(logging.WARNING):
        result = compact(model, images(2))
    assert "units without a weight stay" in caplog.text
    assert "2 of '1'" in caplog.text
    assert ("1", "zeros stay", "2 units without a weight") in result.report.steps


def test_nothing_is_said_where_no_zero_unit_stays(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    kill(model[1], model[3])  # of the last layer, which gives the outputs, they are no surprise
    with caplog.at_level(logging.WARNING):
        assert compact(model, images(2)).report.count("zeros stay") == 0
    assert not caplog.records
