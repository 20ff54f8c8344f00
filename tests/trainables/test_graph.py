import pytest
import torch
from torch import Tensor, nn

from trainables.errors import UserError
from trainables.graph import has_negative_entry, inner_layers, nonnegative_nodes, trace


def names(model: nn.Module) -> list[str]:
    return [inner.name for inner in inner_layers(trace(model))]


def test_inner_layers_are_those_between_two_relus() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)
    )
    assert names(model) == ["3"]  # 1 reads the raw input, 5 feeds a tanh, 7 is the output


def test_signs_are_seen_through_reshapes_and_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert names(model) == ["4"]


def test_functional_relus_count() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(self.a(x).relu())))

    assert names(Functional()) == ["b"]


def test_a_layer_whose_output_is_also_read_elsewhere_is_not_inner() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            before = self.b(torch.relu(self.a(x)))
            return torch.relu(before) + before

    assert names(Skip()) == []


def test_a_layer_that_is_called_twice_is_not_inner() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(2, 2))
    assert names(model) == []


def test_weights_without_a_negative_entry_keep_the_sign_once_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.abs_()
    graph = trace(model)
    assert not has_negative_entry(model[2])
    assert len(nonnegative_nodes(graph, trained=True)) == 2
    assert len(nonnegative_nodes(graph)) == 1


def test_a_negative_bias_makes_a_layer_active() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(-1)
    assert has_negative_entry(layer)


def test_a_network_that_cannot_be_traced_is_named() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Moody\.forward cannot be traced"):
        trace(Moody())
