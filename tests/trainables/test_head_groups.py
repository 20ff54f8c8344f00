"""The heads of attention as units: what makes them, and how important they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.structure.head_groups import HeadGroup, head_groups


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"attention": nn.MultiheadAttention(12, 3, **options), "other": nn.Linear(12, 12)}
    )


def group(model: nn.Module) -> HeadGroup:
    (found,) = head_groups(model)
    return found


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 4, "vdim": 9}])
@torch.no_grad()
def test_a_head_whose_rows_are_zero_adds_nothing_and_the_others_do(options: dict[str, Any]) -> None:
    model = network(**options)
    heads, parameters = group(model), dict(model.named_parameters())
    q, k, v = (
        torch.randn(5, 2, size) for size in (12, options.get("kdim", 12), options.get("vdim", 12))
    )
    attention: Any = model["attention"]  # type: ignore[index]

    def without(columns: slice) -> Tensor:
        before = attention.out_proj.weight.clone()
        attention.out_proj.weight[:, columns] = 0
        out: Tensor = attention(q, k, v)[0]
        attention.out_proj.weight.copy_(before)
        return out

    expected = without(slice(4, 8))
    assert not torch.allclose(attention(q, k, v)[0], expected)
    for name, owners in heads.writers.items():
        assert len(owners) == len(parameters[name])
        parameters[name][owners == 1] = 0
    torch.testing.assert_close(attention(q, k, v)[0], expected)
    assert heads.alive(parameters).tolist() == [True, False, True]


def test_attention_with_values_of_its_own_has_no_heads_that_can_go() -> None:
    assert head_groups(network(add_bias_kv=True)) == []
    assert head_groups(network(add_zero_attn=True)) == []


def test_importance_is_a_sum_over_what_makes_and_reads_a_head_relative_to_the_mean() -> None:
    model = network()
    heads, parameters = group(model), dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        parameters["attention.in_proj_weight"][[0, 13, 26]] = (
            1  # a row of the first head, of the first, of the first
        )
        parameters["attention.in_proj_bias"][4] = 4  # of the second
        parameters["attention.out_proj.weight"][:, 11] = 1  # of the third
    wanted = torch.tensor([36.0, 16.0, 12.0])
    torch.testing.assert_close(heads.importance(torch.square, parameters), wanted / wanted.mean())
    assert heads.parameters == {
        f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")
    }
