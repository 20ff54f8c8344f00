"""Attention taken apart computes what it did, and what cannot be taken apart is refused by name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.tracing.trace import trace
from tests.trainables.networks import Transformer


class Attending(nn.Module):
    """One attention, called as it is told."""

    def __init__(
        self,
        reads: int = 0,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.reads = reads
        self.register_buffer("padding", padding)
        self.register_buffer("mask", mask)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the attention gives first, or its weights."""
        out: Tensor = self.attention(q, k, v, self.padding, attn_mask=self.mask)[self.reads]
        return out


def split(network: nn.Module) -> fx.GraphModule:
    traced = trace(network)
    assert split_attention(traced) == ["attention"]
    traced.graph.lint()
    return traced


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, ((5, 2, 12), (7, 2, 12), (7, 2, 12))),
        ({"batch_first": True}, ((2, 5, 12), (2, 7, 12), (2, 7, 12))),
        ({"batch_first": True}, ((5, 12), (7, 12), (7, 12))),
        ({"bias": False}, ((5, 2, 12), (7, 2, 12), (7, 2, 12))),
        ({"kdim": 4, "vdim": 9}, ((5, 2, 12), (7, 2, 4), (7, 2, 9))),
        ({"mask": torch.linspace(-2, 2, 35).view(5, 7)}, ((5, 2, 12), (7, 2, 12), (7, 2, 12))),
        ({"mask": torch.arange(35).view(5, 7) % 3 == 0}, ((5, 2, 12), (7, 2, 12), (7, 2, 12))),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_parts_compute_what_the_module_does(
    options: dict[str, Any], shapes: tuple[tuple[int, ...], ...], training: bool
) -> None:
    torch.manual_seed(0)
    network = Attending(**options).double().train(training)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    wanted = network(*inputs)
    parts = split(network)
    torch.testing.assert_close(parts(*inputs), wanted)
    kinds = [
        type(module) for name, module in parts.named_modules() if name.startswith("attention.")
    ]
    assert kinds == [nn.Linear, nn.Linear, nn.Linear, Attention, nn.Linear]
    assert not any(isinstance(module, nn.MultiheadAttention) for module in parts.modules())


@torch.no_grad()
def test_a_query_that_attends_to_nothing_gives_what_the_module_gives_without_its_weights() -> None:
    """With its weights, which `need_weights` asks for by default, the module gives NaN there."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2] = True
    network = Attending(mask=mask).eval()
    parts = split(network)
    inputs = [torch.linspace(-1, 1, size * 24).view(size, 2, 12) for size in (5, 7, 7)]
    wanted, _ = network.attention(*inputs, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(parts(*inputs), wanted)


def test_gradients_and_dropout_go_through_the_parts() -> None:
    torch.manual_seed(0)
    heads = Attention(2, dropout=0.5)
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert not torch.equal(heads(q, k, v), heads(q, k, v))
    assert torch.autograd.gradcheck(heads.eval(), (q, k, v))


def test_one_attention_that_is_called_twice_stays_one() -> None:
    class Twice(Attending):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().forward(super().forward(q, k, v), k, v)

    torch.manual_seed(0)
    network, inputs = Twice().eval(), torch.randn(5, 2, 12)
    wanted = network(inputs, inputs, inputs)
    parts = split(network)
    torch.testing.assert_close(parts(inputs, inputs, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, nn.Linear) for module in parts.modules()) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"add_bias_kv": True}, "uses add_bias_kv or add_zero_attn"),
        ({"add_zero_attn": True}, "uses add_bias_kv or add_zero_attn"),
        (
            {"mask": torch.zeros(6, 5, 7)},
            r"has an attn_mask that is not \(L, S\), the same for all inputs and heads",
        ),
        ({"reads": 1}, "has its attention weights read"),
    ],
)
def test_what_the_parts_cannot_do_is_refused_in_a_sentence(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        UserError, match=rf"^the attention 'attention' {said}, which its compact form cannot do$"
    ):
        split(Attending(**options))


def test_a_network_without_attention_is_left_as_it_is() -> None:
    traced = trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    before = str(traced.graph)
    assert split_attention(traced) == []
    assert str(traced.graph) == before


def test_splitting_a_copy_leaves_the_network_in_training_as_it_is() -> None:
    network = Transformer()
    before = [name for name, _ in network.named_parameters()]
    split_attention(copy.deepcopy(trace(network)))
    assert [name for name, _ in network.named_parameters()] == before
