"""Dead heads of attention are removed for real, with equal outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimfront.trainables.compaction import Compacted, compact
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.channel_groups import channel_groups
from tests.trainables.networks import Transformer

INPUTS = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def transformer(*, batch_first: bool = True) -> Transformer:
    """16 wide, with four heads of four and biases that matter."""
    torch.manual_seed(0)
    model = Transformer(batch_first=batch_first).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.in_proj_bias.normal_()
            block.attention.out_proj.bias.normal_()
    return model


def first(model: Transformer) -> nn.MultiheadAttention:
    attention: nn.MultiheadAttention = model.blocks[0].attention  # type: ignore[assignment]
    return attention


def heads(compacted: Compacted) -> dict[str, int]:
    return {
        name: module.heads
        for name, module in compacted.network.named_modules()
        if isinstance(module, Attention)
    }


@torch.no_grad()
def difference(model: nn.Module, compacted: Compacted) -> float:
    wanted: Tensor = model(INPUTS)
    return float((compacted.network(INPUTS) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["values", "values and biases", "unread"])
@torch.no_grad()
def test_a_dead_head_goes_from_all_projections(how: str, batch_first: bool) -> None:
    model = transformer(batch_first=batch_first)
    if how == "unread":
        first(model).out_proj.weight[:, 4:8] = 0
    else:
        first(model).in_proj_weight[36:40] = 0
    if how == "values and biases":
        first(model).in_proj_bias[36:40] = 0
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert compacted.report.steps == (
        ("blocks.0.attention", "heads removed", "1 heads, constant or unread"),
    )
    assert heads(compacted) == {"blocks.0.attention.heads": 3, "blocks.1.attention.heads": 4}
    shapes = {
        name: tuple(p.shape)
        for name, p in compacted.network.named_parameters()
        if name.startswith("blocks.0.attention")
    }
    projected = {
        f"blocks.0.attention.{part}.weight": (12, 16) for part in ("query", "key", "value")
    }
    assert {name: shape for name, shape in shapes.items() if "weight" in name} == projected | {
        "blocks.0.attention.out.weight": (16, 12)
    }
    before, after = measure(model, INPUTS), compacted.report.after
    tokens, width, head = 9, 16, 4
    assert before["params"] - after["params"] == 3 * head * (width + 1) + width * head
    # Three projections and the output projection; products with keys and with values.
    assert (
        before["flops"] - after["flops"]
        == 2 * tokens * 4 * width * head + 2 * 2 * tokens * tokens * head
    )
    assert after["layers"] == before["layers"]
    assert after["peak_activation_bytes"] <= before["peak_activation_bytes"]


@torch.no_grad()
def test_attention_without_a_live_head_goes_and_leaves_its_constant() -> None:
    model = transformer()
    first(model).in_proj_weight[32:] = 0
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert compacted.report.steps == (
        ("blocks.0.attention", "removed", "4 heads, constant or unread"),
    )
    assert heads(compacted) == {"blocks.1.attention.heads": 4}
    left = {
        name
        for name, _ in compacted.network.named_parameters()
        if name.startswith("blocks.0.attention")
    }
    assert left == {"blocks.0.attention.out.weight", "blocks.0.attention.out.bias"}


@torch.no_grad()
def test_attention_that_adds_nothing_goes_as_a_whole_branch() -> None:
    model = transformer()
    first(model).out_proj.weight.zero_()
    first(model).out_proj.bias.zero_()
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert compacted.report.count("block removed") == 1
    assert not any(
        "blocks.0.attention" in name or "blocks.0.norm1" in name
        for name, _ in compacted.network.named_modules()
    )


@torch.no_grad()
def test_a_head_that_is_zero_in_part_stays() -> None:
    model = transformer()
    first(model).in_proj_weight[:16] = 0  # uniform attention, which is no constant
    first(model).in_proj_weight[32:35] = 0
    first(model).out_proj.weight[:, 4:7] = 0
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert heads(compacted) == {"blocks.0.attention.heads": 4, "blocks.1.attention.heads": 4}
    assert compacted.report.after["params"] == measure(model, INPUTS)["params"]


@torch.no_grad()
def test_channels_that_are_zero_in_all_projections_do_not_go_from_within_a_head() -> None:
    model = transformer()
    for start in (0, 16, 32):
        first(model).in_proj_weight[start + 5] = 0
        first(model).in_proj_bias[start + 5] = 0
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert compacted.report.after["params"] == measure(model, INPUTS)["params"]
    assert [group.name for group in channel_groups(compacted.network, INPUTS)] == [
        "blocks.0.up",
        "blocks.1.up",
    ]


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
@torch.no_grad()
def test_whatever_heads_are_dead_go_and_outputs_stay_equal(seed: int) -> None:
    model, generator = transformer(), torch.Generator().manual_seed(seed)
    left = {}
    for index, block in enumerate(model.blocks):
        attention: nn.MultiheadAttention = block.attention  # type: ignore[assignment]
        kinds = torch.randint(
            0, 4, (4,), generator=generator
        ).tolist()  # alive, constant, zero, unread
        for head, kind in enumerate(kinds):
            rows = slice(4 * head, 4 * head + 4)
            if kind in (1, 2):
                attention.in_proj_weight[32:][rows] = 0
            if kind == 2:
                attention.in_proj_bias[32:][rows] = 0
            if kind == 3:
                attention.out_proj.weight[:, rows] = 0
        if kinds.count(0):
            left[f"blocks.{index}.attention.heads"] = kinds.count(0)
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert heads(compacted) == left


@torch.no_grad()
def test_an_attention_that_is_called_twice_keeps_its_heads() -> None:
    model = transformer()
    model.blocks[1].attention = model.blocks[0].attention
    first(model).in_proj_weight[36:40] = 0
    compacted = compact(model, INPUTS)
    assert difference(model, compacted) < 1e-5
    assert set(heads(compacted).values()) == {4}
