"""What goes with a layer's channels is found in the end, whatever the network does to its axes."""

import logging
import time

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.structure.dependencies import Dependencies
from slimfront.trainables.structure.removable import removable_groups, removable_units

INPUTS = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(1))


class TurnedAbout(nn.Module):
    """Rows that are made images and rows again: each time, Torch-Pruning takes a channel for 64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rows = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 3, padding=1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 64) to (N, 5)."""
        x = self.rows(torch.relu(self.stem(x)))
        for _ in range(6):
            x = x.view(x.size(0), -1, 8, 8).flatten(2)
        out: Tensor = self.head(x.flatten(1))
        return out


def turned_about() -> nn.Module:
    """Channels 1 and 2 of `stem` and channel 1 of `rows` are zero."""
    torch.manual_seed(0)
    model = TurnedAbout().eval()
    with torch.no_grad():
        for layer, dead in ((model.stem, [1, 2]), (model.rows, [1])):
            for parameter in layer.parameters():
                parameter[dead] = 0
    return model


def test_channels_that_would_multiply_without_end_are_left_out_and_found_by_our_own_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began = time.monotonic()
    endless: list[str] = []
    groups = removable_groups(turned_about(), INPUTS, endless)
    assert [group.name for group in groups] == ["stem"]
    assert endless == ["rows"]
    assert [group.name for group in removable_units(turned_about(), INPUTS)] == ["stem", "rows"]
    assert time.monotonic() - began < 20
    assert caplog.records == []


def test_compaction_of_such_a_network_ends_and_removes_what_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Our own graph of units follows the entries themselves, and so finds the end."""
    model = turned_about()
    with caplog.at_level(logging.WARNING):
        result = compact(model, INPUTS)
    torch.testing.assert_close(result.network(INPUTS), model(INPUTS))
    shapes = [tuple(p.shape) for p in result.network.parameters() if p.dim() > 1]
    assert shapes == [(4, 3, 1), (3, 4, 3), (5, 192)]
    assert caplog.text == ""


class Coupled(nn.Module):
    """A residual addition, a concatenation, a depthwise convolution and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.beside = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 3))
        self.norm, self.each = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) to (N, 5)."""
        y = self.stem(x)
        y = torch.cat([torch.relu(y + self.branch(torch.relu(y))), self.beside(x)], 1)
        out: Tensor = self.head(self.each(self.norm(y)).flatten(1))
        return out


def described(graph: torch_pruning.DependencyGraph, layer: nn.Module, idxs: list[int]) -> object:
    group = graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, idxs
    )
    # Fmt: skip.
    return [
        (
            item.dep.layer if isinstance(item.dep.layer, nn.Module) else None,
            item.dep.handler.__name__,
            sorted(zip(item.idxs, item.root_idxs, strict=True)),
        )
        for item in group
    ]


@pytest.mark.parametrize("idxs", [[3], list(range(8))])
@pytest.mark.parametrize("name", ["stem", "branch", "beside"])
def test_what_goes_together_is_what_torch_pruning_finds(name: str, idxs: list[int]) -> None:
    model, inputs = Coupled().eval(), torch.rand(1, 3, 4, 4)
    found = []
    for kind in (torch_pruning.DependencyGraph, Dependencies):
        graph = kind()
        graph.build_dependency(model, example_inputs=(inputs,), verbose=False)
        said = described(graph, model.get_submodule(name), idxs)
        found.append([(str(layer), *rest) for layer, *rest in said])  # type: ignore[attr-defined]
    assert found[0] == found[1]
    assert len(found[0]) > 4
