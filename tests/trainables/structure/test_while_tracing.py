"""What networks ask of shapes while torch.fx traces them: it knows none, and the tracer runs the
part that is there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.structure.tracing.symbolic import symbolically_traced
from tests.trainables.networks import asserted

Code = Callable[[Any, Tensor], Tensor]


class Asks(nn.Module):
    """A residual network whose code, between its convolutions, is given."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.short = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.code = code
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.code(self, self.norm(self.first(x)).relu())
        made: Tensor = self.head(h.mean((2, 3)))
        return made


def _unpacked(net: Any, h: Tensor) -> Tensor:
    count, channels, *sides = h.shape
    means = h.reshape(count, channels, -1).mean(-1)
    return net.second(h * means.view(*h.shape[:2], *[1] * len(sides)))


def _of_parts(net: Any, h: Tensor) -> Tensor:
    return net.second(torch.cat([part * 1.5 for part in h.chunk(2, 1)], 1))


def _by_channels(net: Any, h: Tensor) -> Tensor:
    wide = net.short(h)
    if h.shape[1] != wide.shape[1]:
        h = torch.cat([h, net.second(h)], 1)
    return h + wide


def _by_rank(net: Any, h: Tensor) -> Tensor:
    assert h.ndim in (3, 4)
    if len(h.shape) == 3:
        h = h.unsqueeze(0)
    return net.second(h) if h.dim() == 4 and h.dtype.is_floating_point else h


def _by_numbers(net: Any, h: Tensor) -> Tensor:
    parts = int(h.size(1) / 4)
    return net.second(h) * float(parts)


ASKED: dict[str, Code] = {
    "shapes are unpacked": _unpacked,
    "parts are gone through": _of_parts,
    "channels decide": _by_channels,
    "the number of axes decides": _by_rank,
    "channels are counted": _by_numbers,
    "it is asserted": lambda net, h: net.second(asserted(h)),
}


@pytest.mark.parametrize("name", ASKED)
def test_it_is_answered_where_it_is_the_same_for_all_inputs(name: str) -> None:
    network = Asks(ASKED[name])
    inputs = torch.randn(6, 3, 8, 8)
    network(inputs)
    symbolically_traced(network, inputs)
    assert all(module.training for module in network.modules())
    small = sf.prune(network, [inputs], channels=0.5, recalibrate=False)
    before = sum(parameter.numel() for parameter in network.parameters())
    assert small.measures["params"] < 0.8 * before
    again = sf.compact(network.eval(), inputs).network
    for shape in ((6, 3, 8, 8), (1, 3, 8, 8), (5, 3, 7, 9)):
        other = torch.randn(shape)
        torch.testing.assert_close(again(other), network(other), rtol=1e-4, atol=1e-5)
        assert small.network(other).shape == (shape[0], 4)


def _by_parity(net: Any, h: Tensor) -> Tensor:
    return net.second(h) if h.shape[-1] % 2 == 0 else h


def _by_no_assertion(net: Any, h: Tensor) -> Tensor:
    if h.shape[-1] >= 3:
        return net.second(h)
    raise AssertionError


def _by_size(net: Any, h: Tensor) -> Tensor:
    return net.second(h) if h.shape[-1] > 2 else h


def _by_examples(net: Any, h: Tensor) -> Tensor:
    return net.second(h) if h.shape[0] == 1 else h


def _by_values(net: Any, h: Tensor) -> Tensor:
    return net.second(h) if h.sum() > 0 else h


NOT_ASKED: dict[str, Code] = {
    "whether a size is even": _by_parity,
    "a size": _by_size,
    "a size, and what looks like an assertion": _by_no_assertion,
    "the number of inputs": _by_examples,
    "values": _by_values,
}


@pytest.mark.parametrize("name", NOT_ASKED)
def test_what_follows_from_the_inputs_is_not_answered(name: str) -> None:
    network = Asks(NOT_ASKED[name])
    inputs = torch.randn(6, 3, 8, 8)
    network(inputs)
    with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
        symbolically_traced(network, inputs)


def test_a_network_that_goes_by_whether_a_size_is_even_is_told_of(caplog: Any) -> None:
    network = Asks(_by_parity)
    inputs = torch.randn(6, 3, 8, 8)
    network(inputs)
    sf.compact(network.eval(), inputs)
    (said,) = [said for said in caplog.messages if "of the size that it was made" in said]
    assert "not for float32 (N, 3, 7, 7)" in said


def _joined(windows: Tensor, height: int, width: int) -> Tensor:
    """(windows, c, 2, 2) to (n, c, height, width), as in networks of windows."""
    assert not isinstance("2", int)
    count = int(windows.shape[0] / (height * width / 2 / 2))
    parts = windows.view(count, int(height / 2), int("2") * width // 4, -1, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, height, width)


def _by_windows(net: Any, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    parts = h.view(n, c, height // 2, 2, width // 2, 2)
    windows = parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 2, 2)
    return net.second(_joined(windows * 2, height, width))


def test_a_whole_number_may_follow_from_the_inputs() -> None:
    network = Asks(_by_windows)
    inputs = torch.randn(6, 3, 8, 8)
    network(inputs)
    small = sf.prune(network.eval(), [inputs], channels=0.5, fit=False, recalibrate=False)
    before = sum(parameter.numel() for parameter in network.parameters())
    assert small.measures["params"] < 0.8 * before
    again = sf.compact(network, inputs).network
    for shape in ((6, 3, 8, 8), (1, 3, 8, 8), (5, 3, 6, 10)):
        other = torch.randn(shape)
        torch.testing.assert_close(again(other), network(other), rtol=1e-4, atol=1e-5)
        assert small.network(other).shape == (shape[0], 4)
    assert "int" not in globals()
    assert int("3") == 3
