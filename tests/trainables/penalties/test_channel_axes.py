"""Channels whose units lie along another axis of a parameter than its first: of transposed
convolutions, of embeddings, and of layers that share an embedding's weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.penalties.channel import ChannelSparsity
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.structure.removable import removable_units
from slimfront.trainables.structure.shared_units import SharedUnits

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, does: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def unet() -> nn.Module:
    def does(net: Any, x: Tensor) -> Tensor:
        wide = net.down(x).relu()
        deep = net.deep(wide).relu()
        return net.head(torch.cat([net.up(deep).relu(), wide], 1))

    return Network(
        does,
        down=nn.Conv2d(3, 8, 3, padding=1),
        deep=nn.Conv2d(8, 12, 2, stride=2),
        up=nn.ConvTranspose2d(12, 10, 2, stride=2),
        head=nn.Conv2d(18, 2, 1),
    )


def tied() -> nn.Module:
    def does(net: Any, x: Tensor) -> Tensor:
        y = net.embed(x)
        return net.out(y + net.fall(net.rise(y).relu()))

    network = Network(
        does,
        embed=nn.Embedding(20, 10),
        rise=nn.Linear(10, 16),
        fall=nn.Linear(16, 10),
        out=nn.Linear(10, 20, bias=False),
    )
    network.out.weight = network.embed.weight
    return network


def encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=norm_first)
    return Network(
        lambda net, x: net.head(net.layers(net.embed(x)).mean(1)),
        embed=nn.Embedding(20, 12),
        layers=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        head=nn.Linear(12, 4),
    )


def recurrent() -> nn.Module:
    return Network(
        lambda net, x: net.head(net.inner(net.embed(x))[0][:, -1]),
        embed=nn.Embedding(20, 10),
        inner=nn.LSTM(10, 12, batch_first=True),
        head=nn.Linear(12, 4),
    )


Case = tuple[Callable[[], nn.Module], Tensor, str, int, dict[str, int]]
CASES: dict[str, Case] = {
    "transposed convolution": (unet, IMAGES, "up", 10, {"up.weight": 1, "up.bias": 0}),
    "tied embedding": (
        tied,
        TOKENS,
        "embed",
        10,
        {"embed.weight": 1, "fall.weight": 0, "fall.bias": 0},
    ),
    "pre-norm": (
        lambda: encoder(norm_first=True),
        TOKENS,
        "embed",
        12,
        {"embed.weight": 1, "layers.layers.0.linear2.weight": 0, "layers.layers.0.norm1.bias": 0},
    ),
    "post-norm": (
        lambda: encoder(norm_first=False),
        TOKENS,
        "embed",
        12,
        {"embed.weight": 1, "layers.layers.0.self_attn.out_proj.weight": 0},
    ),
    "recurrent": (recurrent, TOKENS, "embed", 10, {"embed.weight": 1}),
}
"""How a network is made, its inputs, and a group: its name, its units, and some of its parameters
with the axes along which they lie."""


def case(name: str) -> tuple[nn.Module, Tensor, str, int, dict[str, int]]:
    torch.manual_seed(0)
    make, *rest = CASES[name]
    return make().eval(), *rest


@pytest.mark.parametrize("name", CASES)
def test_the_group_has_all_that_makes_its_units_and_where_they_lie(name: str) -> None:
    network, inputs, group_name, units, axes = case(name)
    group = {group.name: group for group in removable_units(network, inputs)}[group_name]
    assert group.units == units
    assert {of: group.axes.get(of, 0) for of in axes} == axes
    assert axes.keys() <= group.writers.keys()
    for of, owners in group.writers.items():
        shape = dict(network.named_parameters())[of].shape
        assert len(owners) == shape[group.axes.get(of, 0)]


@pytest.mark.parametrize("name", CASES)
def test_the_step_zeroes_small_units_everywhere_and_compaction_takes_them_out(name: str) -> None:
    network, inputs, group_name, units, _ = case(name)
    active = ChannelSparsity(layers={group_name: 1.0}).attach(network, inputs)
    group = active.groups[group_name]
    gone = torch.tensor([1, 4])
    with torch.no_grad():
        for tensor, owners in zip(group.tensors, group.owners, strict=True):
            tensor[torch.isin(owners, gone)] *= 1e-3
    active.proximal(0.02)
    norms = active.norm(group) / group.weight
    assert bool(norms > 0)
    for tensor, owners in zip(group.tensors, group.owners, strict=True):
        assert not tensor[torch.isin(owners, gone)].any()
        left = tensor[(owners >= 0) & ~torch.isin(owners, gone)]
        assert tensor.dim() == 1 or bool(left.flatten(1).any(1).all())
    outputs = network(inputs)
    made = compact(network, inputs).network
    torch.testing.assert_close(made(inputs), outputs, rtol=1e-4, atol=1e-5)
    smaller = dict(made.named_parameters())[f"{group_name}.weight"]
    assert smaller.shape[1] == units - 2


@pytest.mark.parametrize("name", ["transposed convolution", "recurrent"])
def test_importance_sums_what_makes_and_what_reads_a_unit(name: str) -> None:
    network, inputs, group_name, units, _ = case(name)
    found = {group.name: group for group in removable_units(network, inputs)}[group_name]
    assert isinstance(found, SharedUnits)
    parameters = dict(network.named_parameters())
    total = torch.zeros(units)
    for of, axes in ((found.writers, found.axes), (found.readers, found.read_axes)):
        for parameter, owners in of.items():
            rows = parameters[parameter].detach().abs().movedim(axes.get(parameter, 0), 0)
            for place, owner in enumerate(owners.tolist()):
                total[owner] += rows[place].sum() if owner >= 0 else 0
    torch.testing.assert_close(found.importance(Tensor.abs, parameters), total / total.mean())


def test_the_sparsifier_of_channels_masks_columns() -> None:
    assert "channels" in SPARSIFIERS
    network, inputs, group_name, units, _ = case("transposed convolution")
    group = {group.name: group for group in removable_units(network, inputs)}[group_name]
    mask = torch.ones_like(dict(network.named_parameters())["up.weight"], dtype=torch.bool)
    group.rows("up.weight", mask)[torch.arange(units) == 3] = False
    assert mask.sum() == mask.numel() - mask[:, 3].numel()
    assert not mask[:, 3].any()
