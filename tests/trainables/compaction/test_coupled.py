"""Channels that several layers share go together, and only where that changes nothing."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.structure.channel_groups import channel_groups
from slimfront.trainables.structure.tracing.trace import trace
from tests.trainables.networks import Mixed, damage_batch_norms

INPUTS = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Coupled(nn.Module):
    """x + f(x) behind an activation, of a size that may be written into the code."""

    def __init__(self, activation: nn.Module, channels: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.activation = activation
        self.head = nn.Linear(8, 5)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5)."""
        x = self.stem(x)
        x = self.activation(x + self.branch(x)).mean((2, 3))
        if self.channels:
            x = x.view(-1, self.channels)
        out: Tensor = self.head(x)
        return out


def kill(model: nn.Module, unit: int) -> None:
    """Zeroes one unit of every group."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in channel_groups(trace(model), INPUTS):
            for name, owners in group.writers.items():
                parameters[name][owners == unit] = 0


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module) -> float:
    wanted = one.eval()(INPUTS)
    return float((other(INPUTS) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("unit", [0, 2])
def test_channels_go_through_additions_concatenations_grouped_and_depthwise_convolutions(
    unit: int,
) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    damage_batch_norms(model)
    kill(model, unit)
    compacted = compact(model, INPUTS)
    assert difference(model, compacted.network) < 1e-5
    shapes = {
        name: tuple(p.shape)
        for name, p in compacted.network.named_parameters()
        if name.endswith("weight")
    }
    # Six units of 32 concatenated channels, in two groups of 16, that a grouped convolution ties
    # into eight units of four.
    assert shapes["depthwise.weight"][0] == 28
    assert shapes["grouped.weight"] == (20, 7, 3, 3)
    assert shapes["head.weight"] == (5, 80)


def test_channels_of_a_residual_stream_go_from_all_layers_that_share_it() -> None:
    torch.manual_seed(0)
    model = Coupled(nn.ReLU()).eval()
    kill(model, 3)
    compacted = compact(model, INPUTS)
    assert difference(model, compacted.network) < 1e-5
    assert (
        "stem",
        "units removed",
        "1 units, of which nothing is read",
    ) in compacted.report.steps
    shapes = {name: tuple(p.shape) for name, p in compacted.network.named_parameters()}
    assert (shapes["stem.weight"][0], shapes["branch.weight"][:2], shapes["head.weight"]) == (
        7,
        (7, 7),
        (5, 7),
    )


def test_a_channel_that_is_zero_in_one_of_the_layers_only_stays() -> None:
    torch.manual_seed(0)
    model = Coupled(nn.ReLU()).eval()
    with torch.no_grad():
        model.branch.weight[3] = 0
        model.branch.bias[3] = 0
    compacted = compact(model, INPUTS)
    assert compacted.report.after["params"] == measure(model, INPUTS)["params"]


def test_a_channel_stays_where_what_follows_makes_something_of_zero() -> None:
    torch.manual_seed(0)
    model = Coupled(nn.Sigmoid()).eval()  # sigmoid(0) is 0.5
    kill(model, 3)
    compacted = compact(model, INPUTS)
    assert compacted.report.after["params"] == measure(model, INPUTS)["params"]
    assert difference(model, compacted.network) == 0


def test_a_channel_goes_where_the_code_says_how_many_there_are() -> None:
    torch.manual_seed(0)
    model = Coupled(nn.ReLU(), channels=8).eval()
    kill(model, 3)
    compacted = compact(model, INPUTS)
    assert compacted.report.after["params"] < measure(model, INPUTS)["params"]
    assert difference(model, compacted.network) < 1e-5


def test_a_layer_norm_over_the_channels_keeps_them() -> None:
    torch.manual_seed(0)
    model = Coupled(nn.LayerNorm([8, 8, 8])).eval()
    with torch.no_grad():
        for layer in (model.stem, model.branch):
            layer.weight[3] = 0
            layer.bias[3] = 0
    compacted = compact(model, INPUTS)
    assert compacted.report.after["params"] == measure(model, INPUTS)["params"]
    assert difference(model, compacted.network) == 0


def test_a_network_that_torch_pruning_cannot_analyse_loses_its_channels(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("strange")

    torch.manual_seed(0)
    model = Coupled(nn.ReLU()).eval()
    kill(model, 3)
    monkeypatch.setattr("slimfront.trainables.structure.channel_groups._graph", fails)
    with caplog.at_level(logging.WARNING):
        compacted = compact(model, INPUTS)
    assert caplog.text == ""
    assert compacted.report.after["params"] < measure(model, INPUTS)["params"]


def test_what_autograd_made_for_the_analysis_is_let_go_of() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def node() -> Any:
        """Where the gradient of the first weight is accumulated: made anew unless something holds
        on to it."""
        return model[0].weight.view_as(model[0].weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    groups = channel_groups(model, torch.rand(2, 1, 8, 8))
    node().metadata["seen"] = True
    assert "seen" not in node().metadata
    assert len(groups) == 1


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ReLU6()])
def test_nothing_is_printed_where_it_succeeds(
    activation: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Coupled(activation).eval()
    kill(model, 3)
    result = compact(model, INPUTS)
    assert result.report.after["params"] < measure(model, INPUTS)["params"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_a_norm_without_tensors_is_told_how_many_channels_there_are(kind: Any) -> None:
    plain = {"affine": False, "track_running_stats": False}
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), kind(16, **plain), nn.ReLU()),
        *(nn.Conv2d(16, 4, 3, padding=1),),
    )
    with torch.no_grad():
        network[0].weight[::2] = 0
        network[0].bias[::2] = 0
    inputs = torch.randn(6, 3, 8, 8)
    small = compact(network.eval(), inputs).network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(small(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    norms = [module for module in small.modules() if isinstance(module, kind)]
    assert [norm.num_features for norm in norms] == [8]
