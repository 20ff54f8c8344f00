"""Forms in which people write what lies between two layers: units that are zero go through each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import slimfront as sf
from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.structure.agreement import Probe

ROWS = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Two layers, `a` and `b`, and what lies between them."""

    def __init__(self, between: Callable[..., Any], a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a = a
        self.b = b
        self.vector = nn.Parameter(torch.randn(16))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)


def linear_attention(net: Any, x: Tensor) -> Tensor:
    q = net.a(x).relu()
    sums = q.sum(1)
    return net.b(torch.einsum("ntd,nd,nte->nte", q, sums, q))


def ellipsis(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    return net.b(torch.einsum("...d,...d->...d", h, h))


def pooled_by_vector(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    weights = (h @ net.vector).softmax(1)
    return net.b((weights.unsqueeze(-1) * h).sum(1))


def grouped_queries(net: Any, x: Tensor) -> Tensor:
    q = net.a(x).unflatten(-1, (4, 4)).transpose(1, 2)
    k, v = q[:, ::2], q[:, ::2]
    made = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return net.b(made.transpose(1, 2).flatten(2))


def largest(net: Any, x: Tensor) -> Tensor:
    return net.b((net.a(x) * net.a(x)).max(1)[0] + net.a(x).max(dim=1).values.relu())


def written(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    z = torch.zeros(x.shape[0], 7, 16, dtype=x.dtype)
    z[:, 1:6] = h
    z[:, 0] = h[:, 0]
    return net.b(z.sum(1))


def tied(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    return net.b(net.a(h @ net.a.weight).relu())


FORMS: dict[str, Callable[..., Any]] = {
    "clamp(min=0)": lambda net, x: net.b(net.a(x).clamp(min=0)),
    "clamp_()": lambda net, x: net.b(net.a(x).clamp_(-1, 1)),
    "power": lambda net, x: net.b(net.a(x) ** 2),
    "hardtanh by clip": lambda net, x: net.b(torch.clip(net.a(x), -1, 1)),
    "cumsum": lambda net, x: net.b(net.a(x).relu().cumsum(1)),
    "T": lambda net, x: net.a(x).relu().flatten(0, 1) @ net.b.weight.T,
    "mT": lambda net, x: net.a(x).relu() @ net.b.weight.mT,
    "inner": lambda net, x: torch.inner(net.a(x).relu(), net.b.weight),
    **{
        does.__name__.replace("_", " "): does
        for does in (linear_attention, ellipsis, pooled_by_vector, largest, written, tied)
    },
}


def zeroed(network: Any) -> nn.Module:
    """With every second row of its first layer zero."""
    with torch.no_grad():
        for parameter in network.a.parameters():
            parameter[::2] = 0
    return network.eval()


def check(network: nn.Module, inputs: Tensor, gone: str = "a") -> nn.Module:
    """The compact network, from which the units went, with what it computes looked at."""
    made = compact(network, inputs)
    assert (gone, "zeros stay") not in {step[:2] for step in made.report.steps}
    small = made.network
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
    assert Probe(network, inputs).difference(small, 1e-5) < 1e-5
    stored = deserialise(serialise(small))
    assert torch.equal(stored(inputs), small(inputs))
    small.train()(inputs).sum().backward()
    return small


@pytest.mark.parametrize("name", FORMS)
def test_units_go_through(name: str) -> None:
    torch.manual_seed(0)
    network = Between(FORMS[name], nn.Linear(8, 16), nn.Linear(16, 3))
    check(zeroed(network), ROWS)


def test_heads_of_grouped_queries() -> None:
    torch.manual_seed(0)
    network = Between(grouped_queries, nn.Linear(8, 16), nn.Linear(16, 3)).eval()
    with torch.no_grad():  # of each head of four, half
        for parameter in network.a.parameters():
            parameter.unflatten(0, (4, 4))[:, ::2] = 0
    small = check(network, ROWS)
    assert small.get_parameter("a.weight").shape == (8, 8)


def test_slopes_behind_a_shuffle_of_pixels() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.PixelShuffle(2), nn.PReLU(4), nn.Conv2d(4, 3, 3))
    network = Between(lambda net, x: net.b(net.a(x)), nn.Conv2d(3, 16, 3, padding=1), layers).eval()
    with torch.no_grad():
        for parameter in network.a.parameters():
            parameter[4:12] = 0
    small = check(network, IMAGES)
    assert small.get_parameter("b.1.weight").numel() == 2


def test_bags_of_embeddings() -> None:
    torch.manual_seed(0)
    network = Between(
        lambda net, x: net.b(net.a(x).relu()), nn.EmbeddingBag(20, 16), nn.Linear(16, 3)
    ).eval()
    with torch.no_grad():
        network.get_parameter("a.weight")[:, ::2] = 0
    small = check(network, TOKENS)
    assert small.get_parameter("a.weight").shape == (20, 8)


def test_a_weight_that_the_code_reads_too_can_be_pruned_and_layers_beside_it_merged() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 6)
            self.back_a, self.back_b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            code = self.b(F.relu(self.a(x)))
            hidden = F.relu(F.linear(code, self.b.weight.t(), self.back_b))
            return F.linear(hidden, self.a.weight.t(), self.back_a)

    torch.manual_seed(0)
    network = zeroed(Autoencoder())
    with torch.no_grad():
        network.get_parameter("back_b")[::2] = 0
    small = check(network, ROWS)
    assert small.get_parameter("a.weight").shape == (8, 8)
    sf.prune(Autoencoder().eval(), [ROWS], channels=0.5)
    with pytest.raises(UserError, match="no layer between activations"):
        sf.prune(Autoencoder().eval(), [ROWS], layers=1)


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_channels_of_a_parametrised_layer_can_be_pruned(norm: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), norm(nn.Conv2d(12, 4, 3))
    ).eval()
    made = sf.prune(network, [IMAGES], channels=0.5)
    after = sum(p.numel() for p in made.network.parameters())
    assert after < 0.7 * sum(p.numel() for p in network.parameters())


@dataclass
class Both:
    one: Tensor
    other: Tensor


class Named(NamedTuple):
    one: Tensor
    other: Tensor


@pytest.mark.parametrize("kind", [Both, Named])
def test_outputs_in_objects_of_a_class(kind: type) -> None:
    torch.manual_seed(0)
    network = zeroed(
        Between(
            lambda net, x: kind(net.b(net.a(x).relu()), net.a(x).sum(1)),
            nn.Linear(8, 16),
            nn.Linear(16, 3),
        )
    )
    small = compact(network, ROWS).network
    before, after = network(ROWS), small(ROWS)
    assert type(after) is kind
    for name in ("one", "other"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))


def test_outputs_in_a_named_tuple_within_a_mapping() -> None:
    torch.manual_seed(0)
    network = zeroed(
        Between(
            lambda net, x: {"both": Named(net.b(net.a(x).relu()), x.sum(1))},
            nn.Linear(8, 16),
            nn.Linear(16, 3),
        )
    )
    small = compact(network, ROWS).network
    torch.testing.assert_close(small(ROWS)["both"].one, network(ROWS)["both"].one)
    assert small.get_parameter("a.weight").shape == (8, 8)


def test_a_network_that_gives_no_numbers_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        network.get_parameter("0.weight")[0, 0] = float("nan")
    with pytest.raises(TrialFailure, match="the network gives NaN"):
        compact(network, ROWS)
    assert not caplog.messages


def test_what_nothing_reads_goes() -> None:
    torch.manual_seed(0)

    def idle(net: Any, x: Tensor) -> Tensor:
        net.a(x)
        return net.b(x)

    network = Between(idle, nn.Linear(8, 16), nn.Linear(8, 3)).eval()
    made = compact(network, ROWS)
    assert "a" not in dict(made.network.named_modules())
    assert ("a", "removed", "nothing reads it") in made.report.steps


@pytest.mark.parametrize("zero", ["gate", "scale"])
def test_a_branch_that_is_zero_whatever_makes_it_so_is_dropped(zero: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            branch = self.down(F.silu(self.gate(x)) * self.up(x))
            return self.head(x + self.scale * branch)

    torch.manual_seed(0)
    network: Any = Gated().eval()
    with torch.no_grad():
        network.down.bias.zero_()
        for parameter in network.gate.parameters() if zero == "gate" else [network.scale]:
            parameter.zero_()
    small = check(network, ROWS, gone="gate")
    assert "down" not in dict(small.named_modules())


class ChannelNorm(nn.LayerNorm):
    """As hand-written ConvNeXts have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def test_channels_before_a_layer_norm_by_a_function_can_be_pruned() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), ChannelNorm(16), nn.Conv2d(16, 16, 3), nn.GELU()),
        *(nn.Conv2d(16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()
    small = sf.prune(network, [IMAGES], channels=0.5).network
    assert small.get_parameter("0.weight").shape[0] < 16
    before, after = (sum(p.numel() for p in each.parameters()) for each in (network, small))
    assert after < 0.6 * before


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norms_in_code_that_is_exported(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(16, affine=affine)
    network = Between(
        lambda net, x: net.b(F.relu_(net.norm(net.a(x)))),
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 3, 3),
    )
    network.norm = norm
    zeroed(network)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter[::2] = 0
    small = check(network, IMAGES)
    assert small.get_parameter("a.weight").shape[0] == 8
