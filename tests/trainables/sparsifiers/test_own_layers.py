"""Layers that are not of torch, and which of their weights take part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

import slimfront as sf
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.sparsifiers.unit_costs import UnitCosts
from slimfront.trainables.sparsifiers.use.products import uses_in_products
from slimfront.trainables.structure.removable import removable_units
from tests.trainables.slimming.test_what_goes import trained as train


class Own(nn.Module):
    """A linear layer as people write it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 1, 12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.weight + self.bias


class Grid(nn.LayerNorm):
    """A norm of torch with a weight of two axes."""


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.grid = Table(), OwnNorm(), Grid((6, 12))
        self.own, self.bare, self.theirs = Own(12, 16), Own(16, 12, bias=False), Conv1D(8, 12)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grid(self.norm(self.table(x)))
        made: Tensor = self.head(self.theirs(self.bare(self.own(x).relu())).relu().mean(1))
        return made


INPUTS = torch.randn(8, 6, 12)


def test_what_their_units_cost_is_counted_as_of_layers_of_torch() -> None:
    torch.manual_seed(0)
    made = {}
    for kind, layers in (
        ("own", [Own(12, 16), nn.ReLU(), Conv1D(10, 16), nn.ReLU(), Own(10, 4)]),
        ("torch", [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)]),
    ):
        network = nn.Sequential(*layers)
        groups = removable_units(network, INPUTS)
        costs = UnitCosts(network, groups, INPUTS, "flops")
        alive = {group.name: torch.arange(group.units) < 5 for group in groups}
        made[kind] = (sorted(group.units for group in groups), costs.whole, costs.total(alive))
    assert made["own"] == made["torch"]
    assert made["own"][1:] == (6 * (12 * 16 + 16 * 10 + 10 * 4), 6 * (12 * 5 + 5 * 5 + 5 * 4))


class Experts(nn.Module):
    """Weights of several experts in one parameter, and a head that is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 8))
        self.table = nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.einsum("nlc,eco->nlo", self.first(x).relu(), self.experts)
        return made @ self.table.weight.t()


def test_so_is_what_code_multiplies_by() -> None:
    network = Experts()
    own = dict(network.named_parameters())
    uses = uses_in_products(
        network, INPUTS, {name: own[name] for name in ("experts", "table.weight")}
    )
    assert uses["table.weight"] == 6
    assert uses["experts"] > 0


def trained(sparsifier: dict[str, Any]) -> tuple[Mixed, sf.Slimming]:
    network = Mixed()
    return network, train(network, INPUTS, sparsifier)


def test_what_multiplies_by_a_matrix_takes_part_and_tables_and_norms_do_not() -> None:
    wanted = ["own.weight", "bare.weight", "theirs.weight", "head.weight"]
    assert list(prunable_weights(Mixed())) == wanted


@pytest.mark.parametrize(
    "options", [{"name": "magnitude"}, {"name": "rigl", "every": 2}, {"name": "random"}]
)
def test_they_reach_the_sparsity(options: dict[str, Any]) -> None:
    network, slim = trained({"sparsity": 0.75} | options)
    weights = prunable_weights(network).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.75, abs=0.01)
    small = slim.compact(INPUTS)
    torch.testing.assert_close(small.network(INPUTS), network.eval()(INPUTS), rtol=1e-4, atol=1e-5)


def test_n_of_m_leaves_them_dense_and_says_so(caplog: Any) -> None:
    network, _ = trained({"name": "nm"})
    assert all(bool(weight.ne(0).all()) for weight in (network.own.weight, network.theirs.weight))
    assert int((network.head.weight == 0).sum()) == 16
    (said,) = [said for said in caplog.messages if "dense stays what has inputs" in said]
    assert "'own.weight', 'bare.weight', 'theirs.weight'" in said


def test_they_are_counted_as_layers_before_and_after() -> None:
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    network = GPT2Model(config).eval()
    tokens = torch.randint(20, (4, 8))
    assert sf.measure(network, tokens)["layers"] == 8
    assert sf.compact(network, tokens, output="last_hidden_state").measures["layers"] == 8
