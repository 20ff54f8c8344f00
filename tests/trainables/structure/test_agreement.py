"""Compaction is judged by structure and shapes, and each output by its own spread; what is wrong is
undone."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.structure import agreement
from slimfront.trainables.structure.agreement import (
    Probe,
    difference,
    difference_in_batches,
    pieces,
)

INPUTS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class ByWidth(nn.Module):
    """Attention whose heads are as many as their width lets there be, behind a layer scale."""

    def __init__(self, scale: float, width: int = 32, head: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(24, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))
        self.head = nn.Linear(width, 5)
        self.width = head

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 5)."""
        x = self.embed(x.transpose(1, 2).flatten(2))
        batch, length = x.shape[0], x.shape[1]
        q, k, v = (
            part(x).view(batch, length, -1, self.width).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1)
        x = x + self.scale * self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        out: Tensor = self.head(x.mean(1))
        return out


class Masked(nn.Module):
    """A class that is masked, behind channels that are no constants when they are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.register_buffer("mask", torch.tensor([0.0, 0, 0, 0, -1e4]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 5)."""
        x = self.stem(x)
        x = torch.sigmoid(x + self.branch(x)).mean((2, 3))
        return F.log_softmax(self.head(x) + self.mask, 1)


class Broadcast(nn.Module):
    """A shortcut that the addition broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 8, 8, 8)."""
        x = torch.relu(self.stem(x))
        return x.mean((2, 3), keepdim=True) + self.branch(x)


def zero(*layers: nn.Module, unit: int | slice = slice(None)) -> None:
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter[unit] = 0


def assert_same(model: nn.Module, network: nn.Module, count: int) -> None:
    fresh = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    wanted, got = model.double()(fresh), network.double()(fresh)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.detach().std()))


def test_heads_that_would_be_partitioned_anew_stay_however_small_the_layer_scale() -> None:
    for scale in (1.0, 1e-2, 1e-5):
        torch.manual_seed(0)
        model = ByWidth(scale).eval()
        zero(model.q, model.k, model.v, unit=slice(0, 24, 3))
        result = compact(model, INPUTS)
        assert result.report.after["params"] == measure(model, INPUTS)["params"]
        assert_same(model, result.network, 7)


def test_one_huge_output_does_not_hide_what_happens_to_the_others() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    zero(model.stem, model.branch, unit=slice(0, 3))
    result = compact(model, INPUTS)
    assert result.report.after["params"] == measure(model, INPUTS)["params"]
    assert_same(model, result.network, 5)


def test_an_empty_branch_stays_where_its_shortcut_is_smaller_than_the_sum() -> None:
    torch.manual_seed(0)
    model = Broadcast().eval()
    zero(model.branch)
    result = compact(model, INPUTS)
    assert result.network(INPUTS).shape == (24, 8, 8, 8)
    assert result.report.count("block removed") == 0
    assert_same(model, result.network, 3)


def test_a_removal_that_is_wrong_is_undone_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from slimfront.trainables.compaction import units

    monkeypatch.setattr(units, "activated", lambda _graph, _activations, bias: bias + 1e-6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    with torch.no_grad():
        model[1].weight[2] = 0
        model[1].bias[2] = 0.5
    with caplog.at_level(logging.WARNING):
        result = compact(model, INPUTS)
    assert "compaction removes no units: that would change the outputs" in caplog.text
    assert result.report.after["params"] == measure(model, INPUTS)["params"]
    assert_same(model, result.network, 3)


def test_a_constant_unit_under_a_pool_with_a_divisor_of_its_own_keeps_what_it_adds() -> None:
    torch.manual_seed(0)
    pool = nn.AvgPool2d(2, divisor_override=3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.5
    assert_same(model, compact(model, INPUTS).network, 3)


def test_a_batch_norm_over_time_is_not_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 5)
    )
    model(INPUTS)
    result = compact(model.eval(), INPUTS)
    assert result.report.count("folded") == 0
    assert_same(model, result.network, 4)


def test_a_network_whose_code_names_float32_is_judged_in_float32() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(192, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.stem(x.flatten(1).to(torch.float32))))
            return out

    model = Cast().eval()
    zero(model.stem, unit=2)
    result = compact(model, INPUTS)
    assert result.report.after["params"] == measure(model, INPUTS)["params"] - 193 - 5
    torch.testing.assert_close(result.network(INPUTS), model(INPUTS))


def test_types_come_back_as_they_were() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)
    ).eval()
    result = compact(model, INPUTS)
    assert {p.dtype for p in result.network.state_dict().values()} == {torch.float32}


def test_structure_shape_and_type_come_before_numbers() -> None:
    x = torch.randn(4, 3)
    assert difference({"a": x}, {"a": x.clone()}, 1e-4) == 0
    for other in ({"b": x}, (x,), {"a": x[:, :1]}, {"a": x.double()}, {"a": None}):
        assert difference({"a": x}, other, 1e-4) == float("inf")


def test_each_element_counts_by_its_own_spread() -> None:
    wanted = torch.tensor([[0.0, 1e4], [1e-3, 1e4]], dtype=torch.float64)
    assert difference(wanted, wanted + torch.tensor([1e-6, 0]), 1e-4) == pytest.approx(
        1e-3, rel=0.2
    )


def test_infinities_are_equal_to_themselves_and_nan_to_nothing() -> None:
    wanted = torch.tensor([[0.0, -torch.inf], [1.0, -torch.inf]])
    assert difference(wanted, wanted.clone(), 1e-4) == 0
    assert difference(wanted, wanted * torch.nan, 1e-4) != difference(
        wanted, wanted * torch.nan, 1e-4
    )


def test_a_size_of_batch_or_a_range_of_values_that_was_written_into_a_network_shows() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(16, -1)

    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 1)

    real = torch.rand(16, 5, dtype=torch.float64)
    probe = Probe(nn.Identity(), real)
    assert probe.agrees(nn.Identity())
    assert not probe.agrees(Fixed())
    assert not probe.agrees(Clipped())


def test_fresh_inputs_are_indices_where_the_real_ones_are() -> None:
    embedding = nn.Embedding(7, 3)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = embedding(x.long())
            return out

    assert Probe(Tokens(), torch.randint(7, (16, 5)).double()).agrees(Tokens())


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_a_batch_at_a_time_gives_the_difference_of_all_inputs_at_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    with torch.no_grad():
        other[1].weight.copy_(one[1].weight + 1e-6 * torch.randn(5, 192))
        other[1].bias.copy_(one[1].bias)
    inputs = INPUTS[:count].double()
    at_once = Probe(one, inputs, fresh=False).difference(other, 1e-4)
    monkeypatch.setattr(agreement, "_AT_ONCE", 5)
    rest = [count % 5] * (count % 5 > 0)
    assert [len(piece) for piece in pieces(inputs, one)] == [5] * (count // 5) + rest
    assert difference_in_batches(one, other, inputs, 1e-4) == pytest.approx(at_once, rel=1e-9)


def test_a_batch_at_a_time_sees_what_is_wrong_in_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.flatten(1)[:, :1] == INPUTS[3, 0, 0, 0], self.value, x.flatten(1))

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(5, -1)

    monkeypatch.setattr(agreement, "_AT_ONCE", 5)
    right = nn.Flatten()
    assert difference_in_batches(right, right, INPUTS, 1e-4) == 0
    assert difference_in_batches(right, Wrong(9.0), INPUTS, 1e-4) > 0.5
    assert difference_in_batches(right, Wrong(torch.nan), INPUTS, 1e-4) != 0
    assert difference_in_batches(right, Fixed(), INPUTS, 1e-4) == float("inf")


def test_large_inputs_come_few_at_a_time() -> None:
    large = torch.empty(1, 3, 224, 224).expand(1024, 3, 224, 224)
    linear = nn.Linear(8, 8)
    assert {len(piece) for piece in pieces(large, linear)} == {27, 25}
    assert [len(piece) for piece in pieces(torch.empty(600, 8), linear)] == [256, 256, 88]


def test_a_convolutional_network_on_a_cpu_gets_as_many_as_its_caches_hold() -> None:
    images = torch.empty(100, 1, 32, 32)
    assert [len(piece) for piece in pieces(images, nn.Conv2d(1, 2, 3))] == [64, 36]
    assert [len(piece) for piece in pieces(images, nn.Conv2d(1, 2, 3, device="meta"))] == [100]
