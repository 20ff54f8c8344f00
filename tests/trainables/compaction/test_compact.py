"""Compaction keeps outputs equal and counts exact, on networks of any depth, width, sparsity and
sign."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimfront.trainables.compaction import Compaction, compact, deserialise, serialise
from slimfront.trainables.compaction.merging.merge import MergePolicy
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.measures.measure import measure


class Functional(nn.Module):
    """An activation as a function with arguments of its own, and one as a method."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x, beta=2.0).sigmoid()


ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid, Functional)


def mlp(
    *sizes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [activation()] if index else []
        layers += [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers).to(dtype)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def make_inactive(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()


def sparsify(model: nn.Module, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)


def inputs_for(model: nn.Module, count: int = 50) -> Tensor:
    first = linears(model)[0]
    return torch.randn(
        count,
        first.in_features,
        dtype=first.weight.dtype,
        generator=torch.Generator().manual_seed(9),
    )


def sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in linears(model)]


def test_inactive_layers_merge_into_the_next() -> None:
    model = mlp(6, 5, 4, 3, 2)
    make_inactive(linears(model)[1])
    make_inactive(linears(model)[2])
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(6, 5), (5, 2)]
    assert result.report.count("merged") == 2
    assert result.report.difference < 1e-10


def test_active_layers_and_the_first_layer_stay() -> None:
    model = mlp(6, 5, 4, 2)
    make_inactive(linears(model)[0])  # its input may be negative, so its ReLU does something
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(6, 5), (5, 4), (4, 2)]
    assert not result.report.steps


def test_the_network_given_is_left_as_it_is() -> None:
    model = mlp(6, 5, 4, 2).train()
    make_inactive(linears(model)[1])
    before = [p.detach().clone() for p in model.parameters()]
    compact(model, inputs_for(model))
    assert sizes(model) == [(6, 5), (5, 4), (4, 2)]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.training


def test_merging_can_be_limited_to_where_it_saves_weights() -> None:
    model = mlp(8, 8, 8, 8)
    make_inactive(linears(model)[1])
    with torch.no_grad():
        for layer in linears(model)[1:]:
            layer.weight.zero_()
        linears(model)[1].weight[0] = (
            1  # one unit that reads everything, and one output row of everything:
        )
        linears(model)[1].weight[:, 0] = 1
        linears(model)[2].weight[:, 0] = 1  # their product is full
        linears(model)[2].weight[0] = 1
    smaller = compact(model, inputs_for(model), Compaction(merge="smaller"))
    always = compact(model, inputs_for(model), Compaction(merge="always"))
    never = compact(model, inputs_for(model), Compaction(merge="never"))
    assert len(linears(always.network)) == 2
    assert len(linears(smaller.network)) == len(linears(never.network)) == 3
    assert smaller.report.count("kept apart") == 1
    nonzeros = [measure(r.network, inputs_for(model))["nonzero_params"] for r in (smaller, always)]
    assert nonzeros[0] < nonzeros[1]


def test_unfed_units_go_and_their_constants_move_into_the_next_bias() -> None:
    model = mlp(3, 4, 2)
    first, second = linears(model)
    with torch.no_grad():
        first.weight[1] = 0
        first.bias[1] = 0.5
        first.weight[2] = 0
        first.bias[2] = -0.5  # ReLU makes it 0
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(3, 2), (2, 2)]
    expected = second.bias + 0.5 * second.weight[:, 1]
    torch.testing.assert_close(linears(result.network)[1].bias, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_constants_go_through_any_activation(activation: type[nn.Module]) -> None:
    """Most of them make something else of 0, which is what a unit without weights gives then."""
    model = mlp(3, 4, 4, 2, activation=activation)
    first, second, third = linears(model)
    with torch.no_grad():
        for unit, bias in enumerate((0.5, 0.0, -0.5)):
            second.weight[unit] = 0
            second.bias[unit] = bias
        passed = activation()(torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64))
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(3, 4), (4, 1), (1, 2)]
    expected = third.bias + third.weight[:, :3] @ passed
    torch.testing.assert_close(linears(result.network)[2].bias, expected)
    with torch.no_grad():
        second.weight.zero_()
    emptied = compact(model, inputs_for(model))
    assert sizes(emptied.network) == [(3, 2)]
    assert first.weight.any()


def test_unread_units_go() -> None:
    model = mlp(3, 4, 2)
    with torch.no_grad():
        linears(model)[1].weight[:, [0, 3]] = 0
    assert sizes(compact(model, inputs_for(model)).network) == [(3, 2), (2, 2)]


def test_units_that_relu_always_silences_go() -> None:
    model = mlp(3, 4, 4, 2)
    with torch.no_grad():
        linears(model)[1].weight[2] = -1
        linears(model)[1].bias[2] = 0
    assert sizes(compact(model, inputs_for(model)).network) == [(3, 4), (4, 3), (3, 2)]


def test_the_same_unit_in_the_first_layer_stays_since_inputs_may_be_negative() -> None:
    model = mlp(3, 4, 2)
    with torch.no_grad():
        linears(model)[0].weight[2] = -1
        linears(model)[0].bias[2] = 0
    assert sizes(compact(model, inputs_for(model)).network) == [(3, 4), (4, 2)]


def test_removal_goes_on_until_nothing_is_left_to_remove() -> None:
    model = mlp(3, 4, 4, 2)
    with torch.no_grad():
        linears(model)[2].weight[:, 0] = 0  # unit 0 of the second layer is unread,
        linears(model)[1].weight[1:, 0] = 0  # and it alone read unit 0 of the first
    assert sizes(compact(model, inputs_for(model)).network) == [(3, 3), (3, 3), (3, 2)]


def test_a_network_without_any_path_becomes_its_constant_output() -> None:
    model = mlp(3, 4, 4, 2)
    with torch.no_grad():
        linears(model)[1].weight.zero_()
        linears(model)[1].bias.fill_(-1)
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(3, 2)]
    assert measure(result.network, inputs_for(model))["nonzero_params"] == 2


def test_layers_without_bias_are_merged_and_removed_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 2, bias=False),
    ).double()
    make_inactive(linears(model)[1])
    with torch.no_grad():
        linears(model)[0].weight[0] = 0
    result = compact(model, inputs_for(model))
    assert sizes(result.network) == [(3, 3), (3, 2)]
    assert all(layer.bias is None for layer in linears(result.network))


def test_compaction_can_be_switched_off() -> None:
    model = mlp(6, 5, 4, 2)
    make_inactive(linears(model)[1])
    assert len(linears(compact(model, inputs_for(model), Compaction(enabled=False)).network)) == 3


def test_a_mismatch_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimfront.trainables.compaction.merging import merge

    right = merge.product
    monkeypatch.setattr(merge, "product", lambda a, b, **how: right(b, a, **how))
    model = mlp(4, 4, 4, 4)
    make_inactive(linears(model)[1])
    with pytest.raises(TrialFailure, match="compaction changed the outputs by"):
        compact(model, inputs_for(model))


def test_nan_weights_fail_loudly() -> None:
    model = mlp(4, 4, 4)
    with torch.no_grad():
        linears(model)[1].weight[0, 0] = float("nan")
    with pytest.raises(TrialFailure, match="the network gives NaN"):
        compact(model, inputs_for(model))


def test_a_network_that_cannot_be_traced_is_refused_by_name() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="Moody"):
        compact(Moody(), torch.zeros(1, 2))


@st.composite
def networks(draw: st.DrawFn) -> nn.Sequential:
    """Random MLPs: some layers inactive, some weights zero, of several activations."""
    hidden = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    seed = draw(st.integers(0, 10_000))
    sizes = (draw(st.integers(1, 6)), *hidden, draw(st.integers(1, 4)))
    model = mlp(*sizes, seed=seed, activation=draw(st.sampled_from(ACTIVATIONS)))
    for layer in linears(model):
        if draw(st.booleans()):
            make_inactive(layer)
    sparsify(model, draw(st.sampled_from([0.0, 0.3, 0.6, 0.9])), seed)
    return model


@given(networks(), st.sampled_from(["always", "smaller", "never"]))
def test_any_network_keeps_its_outputs_and_never_grows(model: nn.Sequential, merge: str) -> None:
    inputs = inputs_for(model)
    result = compact(model, inputs, Compaction.model_validate({"merge": merge, "tolerance": 1e-10}))
    before, after = measure(model, inputs), measure(result.network, inputs)
    assert after["layers"] == before["layers"] - result.report.count(
        "merged"
    ) - result.report.count("removed")
    if merge != "always":
        assert all(after[name] <= before[name] for name in ("params", "nonzero_params", "flops"))
    fresh = torch.randn(30, inputs.shape[1], dtype=torch.float64)
    torch.testing.assert_close(result.network(fresh), model(fresh), rtol=1e-8, atol=1e-10)


@given(networks())
def test_float32_outputs_agree_to_the_default_tolerance(model: nn.Sequential) -> None:
    single = model.float()
    assert compact(single, inputs_for(single)).report.difference <= 1e-4


@given(networks(), st.sampled_from(["always", "smaller", "never"]))
def test_compaction_is_idempotent(model: nn.Sequential, merge: str) -> None:
    options = Compaction.model_validate({"merge": merge})
    once = compact(model, inputs_for(model), options).network
    twice = compact(once, inputs_for(model), options).network
    assert sizes(once) == sizes(twice)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)


@given(networks(), st.sampled_from([0.0, 0.2, 0.6]), st.booleans(), st.integers(0, 99))
def test_a_glance_at_a_compact_network_that_lost_weights_misses_nothing(
    model: nn.Sequential, share: float, a_unit: bool, seed: int
) -> None:
    """What is found at once to have nothing more to remove is what all exact steps make of it."""
    inputs = inputs_for(model)
    network = compact(model, inputs).network
    sparsify(network, share, seed)
    if a_unit:
        with torch.no_grad():
            next(network.parameters())[0] = 0
    found = compact(network, inputs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[compact.__module__], "is_reduced", lambda *_: False)
        expected = compact(network, inputs)
    assert found.report.after == expected.report.after
    assert found.report.steps == expected.report.steps
    assert torch.equal(found.network(inputs), expected.network(inputs))


def test_nothing_is_compared_where_nothing_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(5, 6, 7, 3)
    network = compact(model, inputs_for(model)).network
    with torch.no_grad():
        linears(network)[1].weight[2, 3] = 0
    asked: list[nn.Module] = []
    place = sys.modules[compact.__module__]
    monkeypatch.setattr(place, "relative_difference", lambda *_: asked.append(network) or 0.0)
    assert compact(network, inputs_for(model)).report.difference == 0
    assert not asked
    with torch.no_grad():
        linears(network)[1].weight[2] = 0
    compact(network, inputs_for(model))
    assert asked


@given(networks())
def test_the_result_survives_plain_data_bit_exactly(model: nn.Sequential) -> None:
    inputs = inputs_for(model)
    network = compact(model, inputs).network
    assert torch.equal(deserialise(serialise(network))(inputs), network(inputs))


def test_a_bottleneck_is_not_multiplied_out_unless_the_fewest_layers_are_asked_for() -> None:
    model = mlp(64, 128, 8, 128, 64)
    for layer in linears(model)[1:3]:
        make_inactive(layer)
    inputs = inputs_for(model)
    before = measure(model, inputs)
    result = compact(model, inputs)
    assert result.report.count("kept apart") == 1  # 128 × 128 instead of 2 × 8 × 128
    assert all(
        result.report.after[name] <= before[name] for name in ("params", "nonzero_params", "flops")
    )
    always = compact(model, inputs, Compaction(merge="always"))
    assert len(linears(always.network)) == 2


@pytest.mark.parametrize("policy", ["smaller", "never"])
def test_a_dead_bottleneck_keeps_one_unit_rather_than_a_large_matrix_of_zeros(
    policy: MergePolicy,
) -> None:
    model = mlp(64, 128, 2, 128, 64)
    with torch.no_grad():
        linears(model)[1].weight.zero_()
        linears(model)[1].bias.fill_(0.5)
    result = compact(model, inputs_for(model), Compaction(merge=policy))
    assert sizes(result.network) == [(64, 1), (1, 64)]
    assert result.report.after["nonzero_params"] == 64  # the constant output is all that there is
    torch.testing.assert_close(result.network(inputs_for(model)), model(inputs_for(model)))
