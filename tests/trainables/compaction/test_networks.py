"""What compaction must do to every network that we ship: outputs equal, counts exact, idempotent,
and it survives storage."""

import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimfront import Candidate
from slimfront.trainables.compaction import Compaction, compact, deserialise, serialise
from slimfront.trainables.data import Digits
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MODELS
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.structure.targets.branches import residual_branches
from slimfront.trainables.structure.targets.layers import hidden_layers, inner_layers
from slimfront.trainables.structure.tracing.trace import trace
from tests.marks import often

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"depth": 4, "width": 8},
    "lenet": {"width": 0.5},
    "vgg": {"depth": 11, "width": 4},
    "resnet20": {"depth": 14, "width": 4},
    "resnet18": {"depth": 1, "width": 4},
}
NAMES = sorted(NETWORKS)
SOME = often(NAMES, *sorted(set(NAMES) - {"resnet18", "resnet20", "vgg"}))
"""Those whose siblings are as good are looked at where there is time."""
SHAPE = (1, 8, 8)


def build(name: str, seed: int = 0) -> nn.Module:
    """A network in float64 whose batch norms have seen data, and have scales and shifts of all
    signs."""
    torch.manual_seed(seed)
    model = MODELS[name](name=name, **NETWORKS[name]).build(SHAPE, outputs=5).double().train()
    for _ in range(2):
        model(torch.randn(16, *SHAPE, dtype=torch.float64))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def damage(
    model: nn.Module, seed: int, *, sparsity: float, inactive: float, empty: float, dead: float
) -> dict[str, int]:
    """Makes the network sparse, some layers inactive, some branches zero, some channels dead; how
    many of each."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    graph = trace(model)
    counts = {"inactive": 0, "empty": 0, "dead": 0}
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight.mul_(
                torch.rand(weight.shape, generator=generator, dtype=weight.dtype) >= sparsity
            )
        for layer in hidden_layers(graph):
            factors = (torch.rand(layer.layer.weight.shape[0], generator=generator) >= dead).to(
                layer.layer.weight
            )
            counts["dead"] += int((factors == 0).sum())
            layer.scale_rows(factors)
        for layer in inner_layers(graph):
            if chosen(inactive):
                layer.write_folded(*(t.clamp(min=0) for t in layer.folded()))
                counts["inactive"] += 1
        for branch in residual_branches(graph):
            if chosen(empty):
                branch.layer.scale_rows(
                    torch.zeros(branch.layer.layer.weight.shape[0], dtype=torch.float64)
                )
                counts["empty"] += 1
    return counts


def relative(expected: Tensor, actual: Tensor) -> float:
    return float(((expected - actual).abs().max() / expected.abs().max()).detach())


def real_and_random_inputs() -> Tensor:
    real = Digits().load().test.inputs[:20].double()
    return torch.cat(
        [
            real,
            torch.randn(
                20, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
            ),
        ]
    )


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    shares=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3),
    merge=st.sampled_from(["always", "smaller"]),
)
def test_outputs_stay_equal_and_compaction_is_idempotent(
    name: str, seed: int, sparsity: float, shares: tuple[float, float, float], merge: str
) -> None:
    model = build(name, seed)
    inactive, empty, dead = shares
    damage(model, seed, sparsity=sparsity, inactive=inactive, empty=empty, dead=0.3 * dead)
    inputs = real_and_random_inputs()
    options = Compaction.model_validate({"merge": merge, "tolerance": 1e-10})
    result = compact(model, inputs, options)
    assert result.report.difference <= 1e-10
    before, after = measure(model, inputs), measure(result.network, inputs)
    assert after["params"] <= before["params"] or (name, merge) == ("mlp", "always")
    assert after["layers"] <= before["layers"]
    again = compact(result.network, inputs, options)
    assert measure(again.network, inputs) == after
    assert not [step for step in again.report.steps if step[1] not in ("kept apart", "zeros stay")]
    single = compact(model.float(), inputs.float())
    assert single.report.difference <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_all_batch_norms_are_folded(name: str) -> None:
    result = compact(build(name), real_and_random_inputs())
    assert not [
        m for m in result.network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    ]


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_every_empty_block_is_removed_with_its_layers(name: str) -> None:
    model = build(name)
    layers = measure(model, torch.zeros(1, *SHAPE, dtype=torch.float64))["layers"]
    counts = damage(model, 1, sparsity=0, inactive=0, empty=0.6, dead=0)
    assert 0 < counts["empty"] < len(residual_branches(trace(model)))
    result = compact(model, real_and_random_inputs())
    assert result.report.count("block removed") == counts["empty"]
    assert result.report.after["layers"] == layers - 2 * counts["empty"] - result.report.count(
        "merged"
    )


@pytest.mark.parametrize("name", ["lenet", "vgg", "resnet20", "resnet18"])
def test_dead_channels_are_removed_for_real(name: str) -> None:
    model = build(name)
    counts = damage(model, 2, sparsity=0, inactive=0, empty=0, dead=0.4)
    assert counts["dead"] > 0
    result = compact(model, inputs := real_and_random_inputs())
    removed = sum(
        int(detail.split()[0])
        for _, action, detail in result.report.steps
        if action == "units removed"
    )
    # The stem's channels are also read by the first shortcut.
    stem = 1 if name.startswith("resnet") else 0
    assert removed >= counts["dead"] - stem * NETWORKS[name]["width"]
    assert result.report.after["params"] < 0.8 * measure(model, inputs)["params"]


def test_convolutions_merge_where_that_is_exact_and_costs_no_more() -> None:
    torch.manual_seed(0)

    def inactive(*convolutions: nn.Conv2d) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Conv2d(2, 4, 3), nn.ReLU()]
        for convolution in convolutions:
            with torch.no_grad():
                for parameter in convolution.parameters():
                    parameter.abs_()
            layers += [convolution, nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()

    def layers_after(model: nn.Module) -> int:
        inputs = torch.randn(4, 2, 12, 12, dtype=torch.float64)
        model(inputs)
        result = compact(model, inputs, Compaction(tolerance=1e-10))
        return result.report.after["layers"]

    wide, point = {"kernel_size": 3}, {"kernel_size": 1}
    assert (
        layers_after(
            inactive(nn.Conv2d(4, 8, **wide, padding=1), nn.Conv2d(8, 4, **point, stride=2))
        )
        == 3
    )
    assert layers_after(inactive(nn.Conv2d(4, 8, **point), nn.Conv2d(8, 4, **wide, stride=2))) == 3
    assert (
        layers_after(
            inactive(nn.Conv2d(4, 8, **point, bias=False), nn.Conv2d(8, 4, **wide, padding=1))
        )
        == 3
    )
    # Padded bias.
    assert layers_after(inactive(nn.Conv2d(4, 8, **point), nn.Conv2d(8, 4, **wide, padding=1))) == 4
    # 5 × 5 · 4 · 4 weights instead of 2 · 3 × 3 · 4 · 8; with four channels between, they are more.
    assert layers_after(inactive(nn.Conv2d(4, 8, **wide), nn.Conv2d(8, 4, **wide))) == 3
    assert layers_after(inactive(nn.Conv2d(4, 4, **wide), nn.Conv2d(4, 4, **wide))) == 4
    assert layers_after(inactive(nn.Conv2d(4, 64, **point), nn.Conv2d(64, 64, **point))) == 3
    # The product costs more.
    assert layers_after(inactive(nn.Conv2d(4, 1, **point), nn.Conv2d(1, 64, **wide))) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_result_survives_plain_data_state_dict_and_export(name: str) -> None:
    model = build(name)
    damage(model, 4, sparsity=0.5, inactive=0.5, empty=0.3, dead=0.2)
    inputs = real_and_random_inputs()
    network = compact(model, inputs).network
    expected = network(inputs)
    stored = io.BytesIO()
    torch.save(serialise(network), stored)
    stored.seek(0)
    loaded = deserialise(torch.load(stored, weights_only=True))
    assert torch.equal(loaded(inputs), expected)
    loaded.load_state_dict(network.state_dict())
    assert torch.equal(loaded(inputs), expected)
    exported = torch.export.export(network, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), expected, rtol=1e-10, atol=1e-12)


def test_padded_convolutions_merge_only_on_request_and_exactly_in_the_interior() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 3, 3, padding=1),
        nn.ReLU(),
    ).double()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.abs_()
    inputs = torch.randn(4, 2, 12, 12, dtype=torch.float64)
    exact, close = compact(model, inputs), compact(model, inputs, Compaction(approximate=True))
    assert exact.report.after["layers"] == 3
    assert exact.report.count("merged approximately") == 0
    assert close.report.after["layers"] == 2
    assert close.report.count("merged approximately") == 1
    interior = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(close.network(inputs)[interior], model(inputs)[interior])
    assert relative(model(inputs), close.network(inputs)) > 1e-3  # the border


def test_approximate_merging_without_a_refit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set refit\.epochs to 1 or more"):
        Candidate.model_validate({"compaction": {"approximate": True}})
    assert Candidate.model_validate(
        {"compaction": {"approximate": True}, "refit": {"epochs": 1}}
    ).compaction.approximate


class PreActivation(nn.Module):
    """Residual blocks one right after another, without a ReLU behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("empty", [(0,), (1, 2), (0, 1, 2, 3)])
def test_empty_blocks_right_after_another_are_all_removed(empty: tuple[int, ...]) -> None:
    model = PreActivation().double()
    with torch.no_grad():
        for index in empty:
            for parameter in model.branches[index][2].parameters():
                parameter.zero_()
    result = compact(model, torch.randn(9, 6, dtype=torch.float64), Compaction(tolerance=1e-10))
    assert result.report.count("block removed") == len(empty)
    assert result.report.after["layers"] == 9 - 2 * len(empty)


def test_layers_on_the_last_dimension_are_left_alone_by_a_flatten() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2)).double()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 1
    assert compact(model, torch.randn(6, 3, 4, dtype=torch.float64)).report.difference < 1e-10


def test_a_weighted_sum_keeps_no_sign() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.add(torch.relu(self.a(x)), torch.relu(self.b(x)), alpha=-1))

    assert compact(Difference(), torch.randn(20, 3)).report.count("inactive") == 0
