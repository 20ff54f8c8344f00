"""What a network writes into constants, part by part, is computed once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.structure.tracing.exported import writes_elsewhere
from slimfront.trainables.structure.tracing.trace import trace

IMAGES = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1)).double()


class Windows(nn.Module):
    """Has a mask that its code makes part by part, as networks with shifted windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        mask = x.new_zeros(6, 6)
        count = 0
        for rows in (slice(0, -2), slice(-2, None)):
            for columns in (slice(0, -2), slice(-2, None)):
                mask[rows, columns] = count
                count += 1
        shown = x * (mask != 0)
        mask[0] = 7
        return self.last((shown * mask).mean((2, 3)))


class Drawn(Windows):
    """One of whose constants is drawn anew in each forward pass."""

    def forward(self, x: Tensor) -> Any:
        noise = torch.rand(8, dtype=x.dtype)
        noise[2:4] = 0
        return self.last(self.first(x).relu().mean((2, 3)) * noise)


class Filled(Windows):
    """Writes what it computes into zeros."""

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu().mean((2, 3))
        half = torch.zeros(8, dtype=x.dtype)
        half[:4] = 1
        half[4:] = x.mean()
        return self.last(x * half)


def made(kind: type[Windows]) -> Windows:
    torch.manual_seed(0)
    network = kind().eval().double()
    with torch.no_grad():
        for parameter in network.first.parameters():
            parameter[5:7] = 0
    return network


def same(graph: nn.Module, network: nn.Module) -> bool:
    wanted = network(IMAGES)
    return torch.allclose(graph(IMAGES), wanted) and torch.allclose(graph(IMAGES[:1]), wanted[:1])


def test_it_is_what_it_was_when_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("all of the network was written anew")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refused)
    network = made(Windows)
    graph = trace(network, IMAGES)
    assert not writes_elsewhere(graph)
    assert same(graph, network)
    held = [tuple(buffer.shape) for buffer in graph.buffers()]
    assert held == [(6, 6), (6, 6)]
    types = [buffer.dtype for buffer in graph.float().buffers()]
    assert types == [torch.bool, torch.float32]


def test_units_go_around_it_and_it_is_stored() -> None:
    network = made(Windows)
    small = compact(network, IMAGES).network
    assert same(small, network)
    assert next(small.parameters()).shape[0] == 6
    assert same(deserialise(serialise(small)), network)


@pytest.mark.parametrize("kind", [Drawn, Filled])
def test_what_is_no_constant_stays_an_operation(kind: type[Windows]) -> None:
    network = made(kind)
    graph = trace(network, IMAGES)
    assert isinstance(graph, GraphModule)
    assert not writes_elsewhere(graph)
    assert not [name for name, _ in graph.named_buffers() if "constant" in name]
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = network(IMAGES)
        torch.manual_seed(seed)
        torch.testing.assert_close(graph(IMAGES), wanted)
