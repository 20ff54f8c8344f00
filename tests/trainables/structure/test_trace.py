"""A network that several look at is traced once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.structure.tracing import trace as tracing
from slimfront.trainables.structure.tracing.trace import trace, traced_once

INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that are traced."""
    found: list[nn.Module] = []
    real = tracing.symbolically_traced

    def count(model: nn.Module, sample: Tensor | None = None) -> Any:
        found.append(model)
        return real(model, sample)

    monkeypatch.setattr(tracing, "symbolically_traced", count)
    return found


def test_it_is_while_nobody_changes_it_in_one_mode_for_one_shape(
    network: nn.Module, traces: list[nn.Module]
) -> None:
    with traced_once():
        first = trace(network, INPUTS)
        assert trace(network, INPUTS) is first
        assert trace(network, INPUTS[:2]) is not first
        assert trace(network, INPUTS.double()) is not first
        network.eval()
        assert trace(network, INPUTS) is not first
        assert len(traces) == 4
    assert trace(network, INPUTS) is not trace(network, INPUTS)


def test_a_network_that_is_gone_is_not_taken_for_another() -> None:
    with traced_once():
        for width in range(1, 30):
            graph = trace(nn.Sequential(nn.Linear(6, width)), INPUTS)
            assert graph(INPUTS).shape == (5, width)


def test_a_network_that_cannot_be_traced_is_refused_each_time(traces: list[nn.Module]) -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with traced_once():
        for _ in range(2):
            with pytest.raises(sf.UserError, match="cannot be traced"):
                trace(Moody(), INPUTS)
    assert len(traces) == 2


def test_a_network_is_traced_once_in_each_mode(network: nn.Module, traces: list[nn.Module]) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    penalties = {name: {"strength": 1.0} for name in ("layer", "node", "connection")}
    with sf.Slimming(network, optimizer, INPUTS, steps=10, penalties=penalties) as slim:
        assert all(slim.targets.values())
    assert len(traces) == 2  # in both modes


class Tokens(nn.Module):
    """A learned token before what is given, as many times as there are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.into = nn.Linear(8, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.token.expand(len(x), -1, -1)
        return self.out(torch.cat([tokens, self.into(x)], 1).mean(1))


def test_the_number_of_inputs_may_be_asked_for_by_len() -> None:
    network = Tokens().eval()
    graph = trace(network, torch.randn(5, 3, 8))
    for count in (1, 7):
        inputs = torch.randn(count, 3, 8)
        assert torch.equal(graph(inputs), network(inputs))


class Decides(nn.Module):
    """Computes what its inputs ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x).relu()
        return self.out(hidden) if x.sum() > 0 else -self.out(hidden)


def test_why_a_network_cannot_be_traced_is_said_in_words() -> None:
    why = r"Decides.forward cannot be traced \(its code decides by the values of its inputs\);"
    with pytest.raises(sf.UserError, match=why):
        trace(Decides(), INPUTS)


@pytest.mark.parametrize("name", ["channels", "magnitude"])
def test_a_loop_is_told_before_it_trains_what_cannot_be_made_compact(
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = Decides()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    sparsifier = {"name": name, "sparsity": 0.5}
    sf.Slimming(network, optimizer, INPUTS, steps=5, sparsifier=sparsifier).close()
    (said,) = [said for said in caplog.messages if "compact will refuse" in said]
    assert "when it is trained: Decides.forward cannot be traced" in said


class Remembers(nn.Module):
    """Keeps what it computes at first for all that come after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.places: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.places is None:
            self.places = torch.arange(x.shape[1]) / x.shape[1]
        return self.layer(x + self.places)


def test_nothing_of_a_trace_is_left_in_a_network() -> None:
    network = Remembers().eval()
    trace(network, INPUTS)
    assert network.places is None
    assert isinstance(network(INPUTS), torch.Tensor)
