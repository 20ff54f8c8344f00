"""Penalties find units on the axis where they are, and only those that compaction can remove."""

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.penalties.channel import ChannelSparsity
from slimfront.trainables.penalties.node import NodeSparsity
from slimfront.trainables.structure.graph import layers_of
from slimfront.trainables.structure.removable import removable_groups
from slimfront.trainables.structure.targets.layers import hidden_layers
from slimfront.trainables.structure.tracing.trace import trace

INPUTS = torch.randn(16, 6, 5, generator=torch.Generator().manual_seed(1))


def over_time(channels: int) -> nn.Module:
    """A batch norm of the six time steps behind a linear layer of so many units."""
    return nn.Sequential(
        nn.Linear(5, channels),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * channels, 3),
    )


class Between(nn.Module):
    """Linear layers with something between them that may mix units."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.norm, self.kind = nn.BatchNorm1d(8), kind

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, 5) to (N, 3)."""
        x = torch.relu(self.first(x))
        if self.kind == "softmax":
            x = x.softmax(-1)
        elif self.kind == "mean":
            x = x - x.mean(-1, keepdim=True)
        elif self.kind == "norm":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.head(self.second(x).mean(1))
        return out


@pytest.mark.parametrize("channels", [4, 6, 8])
def test_a_norm_over_time_is_no_norm_of_the_units_before_it(channels: int) -> None:
    model = over_time(channels)
    assert [layer.norm for layer in layers_of(trace(model, INPUTS))] == [None, None]
    assert hidden_layers(trace(model, INPUTS)) == []
    assert removable_groups(model, INPUTS) == []


def test_a_norm_of_the_units_of_vectors_still_belongs_to_them() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    assert [layer.name for layer in hidden_layers(trace(model, INPUTS[:, 0]))] == ["0"]
    assert layers_of(trace(model, INPUTS[:, 0]))[0].norm is model[1]


@pytest.mark.parametrize("channels", [4, 6, 8])
def test_node_and_channel_penalties_leave_such_a_layer_alone(channels: int) -> None:
    model = over_time(channels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for options in (NodeSparsity(strength=1.0), ChannelSparsity(strength=1.0)):
        active = options.attach(model, INPUTS)
        active.after_step(1.0) if active.groups else None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "names"), [("none", ["first"]), ("norm", ["first"]), ("softmax", []), ("mean", [])]
)
def test_channels_that_something_mixes_are_no_targets(kind: str, names: list[str]) -> None:
    torch.manual_seed(0)
    assert [
        group.name for group in removable_groups(Between(kind), INPUTS) if group.name == "first"
    ] == names


def test_a_pool_over_units_mixes_them(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.MaxPool2d(3, 1, 1), nn.Linear(8, 4), nn.Flatten(), nn.Linear(24, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 5
        model[2].weight[1] = 0
        model[2].bias[1] = 0
    inputs = INPUTS.unsqueeze(1)
    network = compact(model, inputs).network
    assert "compaction removes no units" not in caplog.text
    torch.testing.assert_close(network(inputs), model(inputs))
    shapes = [tuple(p.shape) for p in network.parameters() if p.dim() > 1]
    assert (8, 5) in shapes
