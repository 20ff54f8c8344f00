import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.structure.graph import layers_of
from slimfront.trainables.structure.signs import nonnegative_nodes
from slimfront.trainables.structure.targets.branches import residual_branches
from slimfront.trainables.structure.targets.layers import hidden_layers, inner_layers
from slimfront.trainables.structure.tracing.trace import trace


def names(model: nn.Module) -> list[str]:
    return [inner.name for inner in inner_layers(trace(model))]


def test_inner_layers_are_those_between_two_relus() -> None:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 3),
        nn.ReLU(),
        nn.Linear(3, 3),
        nn.ReLU(),
        nn.Linear(3, 3),
        nn.Tanh(),
        nn.Linear(3, 2),
    )
    assert names(model) == ["3"]  # 1 reads the raw input, 5 feeds a tanh, 7 is the output


def test_signs_are_seen_through_reshapes_and_dropout() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(3, 3),
        nn.ReLU(),
        nn.Linear(3, 2),
    )
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
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(2, 2)
    )
    assert names(model) == []


def test_weights_without_a_negative_entry_keep_the_sign_once_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.abs_()
    graph = trace(model)
    inactive = {layer.node for layer in layers_of(graph) if not layer.active()}
    assert [node.target for node in inactive] == ["2"]
    assert len(nonnegative_nodes(graph, lambda node: node in inactive)) == 2
    assert len(nonnegative_nodes(graph)) == 1


def test_a_negative_bias_makes_a_layer_active() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(-1)
    assert layers_of(trace(model))[0].active()


def test_a_network_that_cannot_be_traced_is_named() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Moody\.forward cannot be traced"):
        trace(Moody())


def test_a_batch_norm_belongs_to_its_layer_and_signs_are_seen_through_pooling_and_sums() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
    )
    assert names(model) == ["4"]
    assert [layer.norm is not None for layer in layers_of(trace(model))] == [True, True]
    assert names(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
    ) == ["2.conv1", "3.conv1"]


def test_residual_branches_are_found_whatever_the_shortcut() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), BasicBlock(4, 4, 1), BasicBlock(4, 8, 2))
    assert [branch.name for branch in residual_branches(trace(model))] == [
        "2.conv2",
        "3.conv2",
    ]
    assert [layer.name for layer in hidden_layers(trace(model))] == ["0", "2.conv1", "3.conv1"]


def test_a_sum_of_two_inputs_is_not_a_residual_branch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    assert residual_branches(trace(Two())) == []


@pytest.fixture
def normed() -> nn.Sequential:
    """A convolution and a linear layer with batch norms of all signs, in evaluation mode and
    float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
    )
    model = model.double().train()
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.weight.normal_()
            norm.bias.normal_()
    return model.eval()


def test_folded_rows_compute_what_layer_and_norm_compute(normed: nn.Sequential) -> None:
    convolution, linear = layers_of(trace(normed, torch.zeros(2, 2, 4, 4, dtype=torch.float64)))
    images, vectors = (
        torch.randn(5, 2, 4, 4, dtype=torch.float64),
        torch.randn(5, 12, dtype=torch.float64),
    )
    torch.testing.assert_close(
        nn.functional.conv2d(images, *convolution.folded()), normed[1](normed[0](images))
    )
    torch.testing.assert_close(
        nn.functional.linear(vectors, *linear.folded()), normed[5](normed[4](vectors))
    )


def test_what_is_written_as_folded_reads_back_and_zeros_stay_zero(normed: nn.Sequential) -> None:
    for layer in layers_of(trace(normed, torch.zeros(2, 2, 4, 4, dtype=torch.float64))):
        weight, bias = (t.detach().clamp(min=0) for t in layer.folded())
        layer.write_folded(weight, bias)
        for written, expected in zip(layer.folded(), (weight, bias), strict=True):
            torch.testing.assert_close(written, expected)
        assert torch.equal(layer.layer.weight == 0, weight == 0)
        assert not layer.active()


def test_rows_are_scaled_as_folded_and_the_scale_outlives_normalisation(
    normed: nn.Sequential,
) -> None:
    for layer in layers_of(trace(normed, torch.zeros(2, 2, 4, 4, dtype=torch.float64))):
        weight, bias = (t.detach().clone() for t in layer.folded())
        factors = torch.linspace(0, 1, len(bias), dtype=torch.float64)
        before = layer.layer.weight.detach().clone()
        layer.scale_rows(factors)
        torch.testing.assert_close(
            layer.folded()[0], weight * factors.view(-1, *[1] * (weight.dim() - 1))
        )
        torch.testing.assert_close(layer.folded()[1], bias * factors)
        assert torch.equal(layer.layer.weight, before)  # in front of a norm a scale would be lost
