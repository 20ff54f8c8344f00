"""Residual branches of many kinds: the block penalty finds what makes them zero, and compaction
takes them out then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.inputs import as_one
from slimfront.trainables.models.adapted import as_called_with
from slimfront.trainables.penalties.block import BlockSparsity
from slimfront.trainables.structure.targets.branches import residual_branches
from slimfront.trainables.structure.tracing.trace import trace

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, does: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.3))
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def conv(inputs: int, outputs: int, size: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def convolutional(does: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    def whole(net: Any, x: Tensor) -> Tensor:
        return net.head(does(net, net.stem(x).relu()).mean((2, 3)))

    return Network(whole, stem=conv(3, 16), head=nn.Linear(16, 4), **layers)


def bottleneck(net: Any, x: Tensor) -> Tensor:
    return (x + net.c(net.b(net.a(x).relu()).relu())).relu()


def inverted(net: Any, x: Tensor) -> Tensor:
    return x + net.c(F.relu6(net.b(F.relu6(net.a(x)))))


def squeezed(net: Any, x: Tensor) -> Tensor:
    branch = net.b(net.a(x).relu())
    return (x + branch * net.gate(branch.mean((2, 3), keepdim=True)).sigmoid()).relu()


def scaled(net: Any, x: Tensor) -> Tensor:
    branch = net.a(x).permute(0, 2, 3, 1)
    return x + net.scale * F.dropout(net.b(F.gelu(branch)).permute(0, 3, 1, 2), 0.0)


def group_normed(net: Any, x: Tensor) -> Tensor:
    return x + net.norm(net.a(x))


def normed_behind(net: Any, x: Tensor) -> Tensor:
    return net.head((x + net.norm(net.a(x).relu())).mean(1))


def functional_norm(net: Any, x: Tensor) -> Tensor:
    norm = net.norm
    made = F.batch_norm(net.a(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return x + made.relu()


def functional(net: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, 16)
    made = torch.addmm(net.bias, F.gelu(net.a(flat)), net.weight).view(x.shape)
    return net.head((x + F.dropout(made, 0.1, net.training)).mean(1))


def attended(net: Any, x: Tensor) -> Tensor:
    y = net.norm(x)
    q, k, v = net.qkv(y).chunk(3, -1)
    x = x + net.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)
    return net.head((x + net.down(F.gelu(net.up(x)))).mean(1))


def encoder(*, norm_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Network(
        lambda net, x: net.head(net.layers(x).mean(1)), layers=layers, head=nn.Linear(16, 4)
    )


def two_layers() -> list[str]:
    return [
        f"layers.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.out_proj", "linear2")
    ]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "bottleneck": (
        lambda: convolutional(bottleneck, a=conv(16, 8), b=conv(8, 8, 3), c=conv(8, 16)),
        IMAGES,
        ["c.0"],
    ),
    "inverted residual": (
        lambda: convolutional(inverted, a=conv(16, 32), b=conv(32, 32, 3, 32), c=conv(32, 16)),
        IMAGES,
        ["c.0"],
    ),
    "squeeze-and-excitation": (
        lambda: convolutional(squeezed, a=conv(16, 8), b=conv(8, 16, 3), gate=nn.Conv2d(16, 16, 1)),
        IMAGES,
        ["b.0"],
    ),
    "layer scale": (
        lambda: convolutional(scaled, a=nn.Conv2d(16, 8, 1), b=nn.Linear(8, 16)),
        IMAGES,
        ["b"],
    ),
    "group norm": (
        lambda: convolutional(
            group_normed, a=nn.Conv2d(16, 16, 3, padding=1), norm=nn.GroupNorm(4, 16)
        ),
        IMAGES,
        ["norm"],
    ),
    "norm behind": (
        lambda: Network(
            normed_behind, a=nn.Linear(16, 16), norm=nn.LayerNorm(16), head=nn.Linear(16, 4)
        ),
        ROWS,
        ["norm"],
    ),
    "a norm as a function": (
        lambda: convolutional(functional_norm, a=nn.Conv2d(16, 16, 1), norm=nn.BatchNorm2d(16)),
        IMAGES,
        ["norm"],
    ),
    "a function of parameters": (
        lambda: Network(functional, a=nn.Linear(16, 16), head=nn.Linear(16, 4)),
        ROWS,
        ["weight"],
    ),
    "attention of linear layers": (
        lambda: Network(
            attended,
            norm=nn.LayerNorm(16),
            **{n: nn.Linear(i, o) for n, i, o in (("qkv", 16, 48), ("out", 16, 16))},
            **{n: nn.Linear(i, o) for n, i, o in (("up", 16, 24), ("down", 24, 16))},
            head=nn.Linear(16, 4),
        ),
        ROWS,
        ["out", "down"],
    ),
    "pre-norm": (lambda: encoder(norm_first=True), ROWS, two_layers()),
    "post-norm": (lambda: encoder(norm_first=False), ROWS, two_layers()),
}
"""How a network is made, inputs of it, and what its branches end in."""


def made(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    torch.manual_seed(1)
    make, inputs, wanted = NETWORKS[name]
    return make().eval(), inputs, wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_the_block_penalty_finds_every_branch(name: str) -> None:
    network, inputs, wanted = made(name)
    assert list(BlockSparsity(strength=1.0).attach(network, inputs).groups) == wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_a_branch_that_a_large_step_made_zero_goes_and_the_outputs_stay(name: str) -> None:
    network, inputs, wanted = made(name)
    before = sum(parameter.numel() for parameter in network.parameters())
    active = BlockSparsity(layers={wanted[-1]: 1e6}).attach(network, inputs)
    active.proximal(1.0)
    assert not any(bool(member.tensor.any()) for member in active.groups[wanted[-1]])
    outputs = network(inputs)
    result = compact(network, inputs)
    assert result.report.count("block removed") == 1
    assert sum(parameter.numel() for parameter in result.network.parameters()) < before
    torch.testing.assert_close(result.network(inputs), outputs, rtol=1e-4, atol=1e-5)


def test_a_branch_that_something_else_reads_too_is_none() -> None:
    def does(net: Any, x: Tensor) -> Tensor:
        branch = net.a(x)
        return net.head(torch.cat([x + branch * 2, branch], -1).mean(1))

    network = Network(does, a=nn.Linear(16, 16), head=nn.Linear(32, 4))
    assert residual_branches(trace(network, ROWS)) == []


def test_a_branch_behind_what_makes_something_of_zeros_is_none() -> None:
    def does(net: Any, x: Tensor) -> Tensor:
        return net.head((x + net.a(x).sigmoid()).mean(1))

    network = Network(does, a=nn.Linear(16, 16), head=nn.Linear(16, 4))
    assert residual_branches(trace(network, ROWS)) == []


def test_a_layer_that_is_called_twice_ends_no_branch() -> None:
    def does(net: Any, x: Tensor) -> Tensor:
        x = x + net.a(x)
        return net.head((x + net.a(x)).mean(1))

    network = Network(does, a=nn.Linear(16, 16), head=nn.Linear(16, 4))
    assert residual_branches(trace(network, ROWS)) == []


class Conditioned(nn.Module):
    """Steps, each of which adds what is made of a time: residual ones, or not."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.times = nn.ModuleList(nn.Linear(2, 8) for _ in range(3))
        self.embedding = nn.Linear(2, 2)
        self.last = nn.Linear(8, 4)
        self.residual = residual

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, time = self.first(x), self.embedding(time).relu()
        for layer, of_time in zip(self.steps, self.times, strict=True):
            if self.residual:
                x = x + layer((x * of_time(time)).relu())
            else:
                x = (layer(x) + of_time(time)).relu()
        out: Tensor = self.last(x)
        return out


class Towers(nn.Module):
    """The sum of what two inputs become, of one layer and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.second, self.last = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        made: Tensor = self.last((self.first(x) + self.second(time)).relu())
        return made


class Placed(nn.Module):
    """Features, to which what is made of their positions is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.places = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).float().unsqueeze(1)
        made: Tensor = self.last((self.first(x) + self.places(places)).relu())
        return made


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (Conditioned(residual=True), 3),
        (Conditioned(residual=False), 0),
        (Towers(), 0),
        (Placed(), 0),
    ],
    ids=["residual", "conditioned", "towers", "places"],
)
def test_what_alone_looks_at_an_input_is_no_branch(network: nn.Module, count: int) -> None:
    inputs: Any = {"x": torch.randn(6, 4), "time": torch.randn(6, 2)}
    if isinstance(network, Placed):
        inputs = torch.randn(6, 5, 4)
    given = as_one(inputs)
    graph = trace(as_called_with(network, given, None), given)
    assert len(residual_branches(graph)) == count
