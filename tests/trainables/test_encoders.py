"""torch's transformer encoders are traced into their layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.shipping.network_file import check_storable
from slimfront.trainables.structure.targets.branches import residual_branches
from slimfront.trainables.structure.targets.layers import hidden_layers
from slimfront.trainables.structure.tracing.trace import trace


class Encoded(nn.Module):
    """torch's encoder, and a classifier."""

    def __init__(
        self, mask: Tensor | None = None, norm: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, 12) to (N, L, 4)."""
        out: Tensor = self.head(self.encoder(x, mask=self.mask))
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"norm_first": True, "batch_first": True, "norm": nn.LayerNorm(12)},
        {"activation": "gelu"},
        {"activation": nn.ReLU(), "bias": False},
        {"mask": nn.Transformer.generate_square_subsequent_mask(5), "batch_first": True},
    ],
)
@torch.no_grad()
def test_encoders_are_traced_stored_and_compacted_with_equal_outputs(
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    network, inputs = Encoded(**options).eval(), torch.randn(5, 5, 12)
    check_storable(network, inputs)
    traced = trace(network)
    torch.testing.assert_close(traced(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    kinds = {
        type(traced.get_submodule(str(node.target)))
        for node in traced.graph.nodes
        if node.op == "call_module"
    }
    assert kinds - {nn.ReLU} == {nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention}
    compacted = compact(network, inputs).network
    assert torch.equal(deserialise(serialise(compacted))(inputs), compacted(inputs))  # type: ignore[arg-type]


def test_the_units_of_a_perceptron_in_an_encoder_can_be_removed() -> None:
    torch.manual_seed(0)
    network, inputs = Encoded(batch_first=True).eval(), torch.randn(5, 5, 12)
    assert [layer.name for layer in hidden_layers(trace(network))] == [
        f"encoder.layers.{n}.linear1" for n in (0, 1)
    ]
    with torch.no_grad():
        network.encoder.layers[0].linear1.weight[:7] = 0
    compacted = compact(network, inputs)
    assert dict(compacted.network.named_modules())["encoder.layers.0.linear1"].out_features == 13  # type: ignore[union-attr]


class Translated(nn.Module):
    """torch's transformer, from one sequence to another one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.transformer = nn.Transformer(12, 3, 1, 2, 20, batch_first=True, **options)
        self.head = nn.Linear(12, 4)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 5, 12) to (N, 5, 4)."""
        made = self.transformer(x, x.flip(1), tgt_mask=self.mask, tgt_is_causal=True)
        out: Tensor = self.head(made)
        return out


class Decoded(nn.Module):
    """torch's decoder alone, without a norm at its end."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(12, 3, 20, batch_first=True, **options)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, 12) to (N, L, 4)."""
        out: Tensor = self.head(self.decoder(x, x * 2))
        return out


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", [Translated, Decoded])
@torch.no_grad()
def test_decoders_are_seen_through_too(kind: type[nn.Module], norm_first: bool) -> None:
    torch.manual_seed(0)
    network, inputs = kind(norm_first=norm_first).eval(), torch.randn(6, 5, 12)
    check_storable(network, inputs)
    traced = trace(network, inputs)
    torch.testing.assert_close(traced(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    names = [branch.name for branch in residual_branches(traced)]
    assert sum("multihead_attn" in name for name in names) == 2
    for module in network.modules():
        if isinstance(module, nn.TransformerDecoderLayer):
            module.linear1.weight[:7] = 0
            module.linear1.bias[:7] = 0
    params = sum(parameter.numel() for parameter in network.parameters())
    compacted = compact(network, inputs)
    assert compacted.report.after["params"] == params - 2 * 7 * 25
    again = deserialise(serialise(compacted.network))
    for count in (1, 6):
        some = inputs[:count]
        torch.testing.assert_close(again(some), network(some), rtol=1e-4, atol=1e-5)
