import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.measure import (
    EXTRA_MEASURES,
    MEASURES,
    count_flops,
    measure,
    measure_extra,
)
from slimfront.trainables.structure.tracing.trace import trace
from tests.trainables.networks import Transformer


def test_measures_of_a_known_network_are_exact() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        model[1].weight[0] = 0
    found = measure(model, torch.zeros(5, 2, 4))
    assert set(found) == set(MEASURES)
    assert found["params"] == 8 * 4 + 4 + 4 * 2 + 2
    assert found["nonzero_params"] == found["params"] - 8
    assert found["layers"] == 2
    assert found["flops"] == 2 * (8 * 4 + 4 * 2)  # of one input, whatever the batch
    assert found["bytes"] > 4 * found["params"]


def test_sparse_bytes_are_a_bitmap_and_the_entries_that_are_not_zero_where_that_is_smaller() -> (
    None
):
    model = nn.Sequential(nn.Linear(100, 40, bias=False), nn.Linear(40, 3))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight.view(-1)[:3900] = 0
        model[1].weight.fill_(1)
        model[1].bias.fill_(1)
    assert measure(model, torch.zeros(1, 100))["bytes_sparse"] == 4000 / 8 + 100 * 4 + 4 * (120 + 3)


def test_compressed_bytes_unpack_to_the_bitmap_and_the_entries() -> None:
    model = nn.Linear(1000, 10)
    with torch.no_grad():
        model.weight.mul_(torch.rand_like(model.weight) > 0.95)
    size = measure_extra(model, torch.zeros(1, 1000), ["bytes_compressed"])["bytes_compressed"]
    plain = measure(model, torch.zeros(1, 1000))["bytes_sparse"]
    # Random values hardly compress, a bitmap of one in twenty does.
    assert 0.5 * plain < size < plain


def test_the_peak_of_activations_counts_what_is_alive_at_once() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(10, 100)
            self.narrow = nn.Linear(100, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.flatten(x + self.narrow(self.wide(x)), 1)

    # x (10) stays alive for the addition; the most is while the narrow layer works: x, its input
    # (100) and its output (10).
    assert measure(Residual(), torch.zeros(7, 10))["peak_activation_bytes"] == 4 * (10 + 100 + 10)
    assert measure(trace(Residual()), torch.zeros(7, 10))["peak_activation_bytes"] == 4 * (
        10 + 100 + 10
    )


def test_a_network_that_cannot_be_traced_has_no_peak_of_activations() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError):
        trace(Branching())
    assert "peak_activation_bytes" not in measure(Branching(), torch.ones(1, 3))


def test_extra_measures_are_those_that_are_asked_for() -> None:
    model, inputs = nn.Linear(4, 2), torch.zeros(3, 4)
    assert measure_extra(model, inputs, []) == {}
    assert set(measure_extra(model, inputs, EXTRA_MEASURES, nn.Linear(4, 2))) == set(EXTRA_MEASURES)


@pytest.mark.parametrize("need_weights", [True, False])
def test_measures_count_what_is_within_attention_and_leave_the_choice_of_kernels_alone(
    need_weights: bool,
) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attention(x, x, x, need_weights=need_weights)[0]
            return out

    fast = torch.backends.mha.get_fastpath_enabled()
    found = measure(Attending(), torch.zeros(5, 7, 12))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert found["layers"] == 4
    # Projections; with keys, with values.
    assert found["flops"] == 2 * 7 * 12 * (4 * 12) + 2 * (2 * 7 * 7 * 12)
    # Queries, keys, values and what comes of them.
    assert found["peak_activation_bytes"] == 4 * 7 * 12 * 4


def test_a_transformer_and_its_compact_form_measure_the_same_where_nothing_is_removed() -> None:
    torch.manual_seed(0)
    model, inputs = Transformer().eval(), torch.randn(3, 1, 8, 8)
    before, after = measure(model, inputs), compact(model, inputs).report.after
    # A file has a header for each tensor, and there are more of them.
    same = set(MEASURES) - {"bytes"}
    assert {name: before[name] for name in same} == {name: after[name] for name in same}


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_are_counted_by_hand(
    cls: type[nn.RNNBase], gates: int, bidirectional: bool
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = cls(8, 32, batch_first=True, bidirectional=bidirectional)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)[0]
            return out

    found = measure(Recurrent(), torch.randn(3, 8, 8))["flops"]
    assert found == 8 * 2 * gates * 32 * 40 * (2 if bidirectional else 1)


def test_bilinear_layers_are_counted() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(5, 7, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x[:, :5], x[:, 5:])
            return out

    assert measure(Pair(), torch.randn(2, 12))["flops"] == 2 * 3 * 5 * (7 + 1)


class Queries(nn.Module):
    """Learned queries, which are one tensor for any number of inputs, look at what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, 16))
        self.into = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        queries = self.queries.expand(x.shape[0], -1, -1)
        seen, _ = self.attention(queries, x, x, need_weights=False)
        return self.out(seen).mean(1)


class LearnedState(nn.Module):
    """A recurrent layer that begins with a state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(1, 1, 16))
        self.recurrent = nn.GRU(8, 16, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.expand(-1, x.shape[0], -1).contiguous()
        _, last = self.recurrent(x, state)
        return self.out(last[-1])


@pytest.mark.parametrize("kind", [Queries, LearnedState])
def test_a_parameter_may_be_what_a_layer_is_given(kind: type[nn.Module]) -> None:
    network = kind()
    inputs = torch.randn(6, 5, 8)
    assert measure(network, inputs)["flops"] > 0
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        wanted = network.eval()(inputs)
        assert torch.allclose(compact(network, inputs).network(inputs), wanted, atol=1e-5)


def test_a_network_that_was_made_for_inference_is_measured() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert count_flops(network, torch.zeros(1, 8)) == 2 * (8 * 4 + 4 * 2)
