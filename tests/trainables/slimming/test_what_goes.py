"""Whether what a sparsifier zeroes goes, and what is said where it does not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.sparsifiers.use.products import uses_in_products


def trained(network: nn.Module, inputs: Tensor, sparsifier: dict[str, Any]) -> sf.Slimming:
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    slim = sf.Slimming(network, optimizer, inputs, steps=12, sparsifier=sparsifier)
    for _ in range(12):
        loss = network(inputs).square().mean() + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    return slim


class Recurrent(nn.Module):
    def __init__(self, kind: Any, layers: int, *, both_ways: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(3, 16, layers, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(32 if both_ways else 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layers(x)
        made: Tensor = self.head(states[:, -1])
        return made


@pytest.mark.parametrize(("layers", "both_ways"), [(1, True), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_stacked_recurrent_layers_lose_as_many_units_each(
    kind: Any, layers: int, both_ways: bool, caplog: Any
) -> None:
    network = Recurrent(kind, layers, both_ways=both_ways)
    inputs = torch.randn(8, 6, 3)
    slim = trained(network, inputs, {"name": "channels", "sparsity": 0.5, "of": "params"})
    small = slim.compact()
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert 0.4 * whole < small.measures["params"] <= 0.5 * whole
    assert small.measures["nonzero_params"] == small.measures["params"]
    assert "fewer channels" not in caplog.text
    other = torch.randn(3, 9, 3)
    torch.testing.assert_close(small.network(other), network.eval()(other), rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv2d):
    """Qiao et al. 2019, arXiv 1903.10520, as people write it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Adapted(nn.Linear):
    """A matrix to which another of low rank is added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Scaled(nn.Linear):
    """Weights whose zeros stay zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def standardised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(Standardised(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Adapted(8, 8), nn.ReLU(), Scaled(8, 4)),
    )


IMAGES = torch.randn(8, 3, 8, 8)


def test_zeros_that_do_not_last_are_named_before_the_training(caplog: Any) -> None:
    slim = trained(standardised(), IMAGES, {"name": "magnitude", "sparsity": 0.5})
    (said,) = [said for said in caplog.messages if "do not last" in said]
    assert "do not last in '0.weight', '6.weight': the code changes" in said
    slim.compact()
    assert "its code computes weights from others" in caplog.text


def test_channels_of_such_layers_go(caplog: Any) -> None:
    slim = trained(standardised(), IMAGES, {"name": "channels", "sparsity": 0.4, "every": 1})
    slim.compact()
    assert "do not last" not in caplog.text
    assert "fewer channels" not in caplog.text


def test_channels_that_stay_as_zeros_are_named(caplog: Any) -> None:
    """The largest of all channels are taken, among which zeros may be."""

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            least = x.topk(12, dim=1).values[:, -1:]
            made: Tensor = self.last(x * (x >= least))
            return made

    inputs = torch.randn(32, 16)
    sparsifier = {"name": "channels", "sparsity": 0.5, "of": "params", "every": 1}
    slim = trained(Largest(), inputs, sparsifier)
    slim.compact()
    (said,) = [said for said in caplog.messages if "fewer channels went" in said]
    assert "the compact network has 1,072" in said
    assert said.endswith("those of 'first'")


def test_weights_in_any_memory_format_are_looked_at(caplog: Any) -> None:
    network = standardised().to(memory_format=torch.channels_last)
    trained(network, IMAGES, {"name": "magnitude", "sparsity": 0.5})
    assert "do not last in '0.weight', '6.weight'" in caplog.text


def test_what_code_multiplies_beside_sparse_matrices_is_counted() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("edges", torch.eye(6).to_sparse())
            self.weight = nn.Parameter(torch.randn(4, 16))
            self.last = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = (x @ self.weight).relu()
            beside = torch.stack([torch.sparse.mm(self.edges, one) for one in x.unbind(0)])
            made: Tensor = self.last(beside.mean(1))
            return made

    own = dict(Graph().named_parameters())
    uses = uses_in_products(Graph(), torch.randn(5, 6, 4), {"weight": own["weight"]})
    assert uses == {}  # of another network
    network = Graph()
    weight = network.weight
    assert uses_in_products(network, torch.randn(5, 6, 4), {"weight": weight})["weight"] == 6


def test_a_network_that_cannot_be_copied_can_be_trained() -> None:
    """As one that holds a lock."""

    class Locked(nn.Sequential):
        def __deepcopy__(self, _memo: Any) -> Any:
            raise TypeError("cannot pickle '_thread.lock' object")

    network = Locked(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    trained(network, torch.randn(8, 6), {"name": "magnitude", "sparsity": 0.5})
    assert int((network[0].weight == 0).sum()) > 0


PLACES = torch.randint(0, 7, (2, 20), generator=torch.Generator().manual_seed(0))


class Messages(nn.Module):
    """Messages between nodes, added up in zeros of the width of the nodes, which they need not
    have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 1)
        self.message = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.update = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        sources, targets = PLACES
        sums = torch.zeros_like(h).index_add(1, targets, self.message(h[:, sources]))
        h = h + self.update(torch.cat([sums, h], -1))
        made: Tensor = self.last(h)
        return made


def test_channels_that_would_stay_are_named_and_others_go(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network, inputs = Messages(), torch.randn(16, 7, 5)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    slim = sf.Slimming(
        network,
        optimizer,
        inputs,
        steps=20,
        sparsifier={"name": "channels", "sparsity": 0.3, "of": "params"},
    )
    (said,) = [said for said in caplog.messages if "would be zeros" in said]
    assert "the channels of 'first', 'message.2' stay as they are" in said
    for _ in range(20):
        optimizer.zero_grad()
        (network(inputs).square().mean() + slim.loss()).backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    assert bool(network.update.weight.flatten(1).any(1).all())
    made = slim.compact(inputs)
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert made.measures["params"] <= 0.71 * whole
    assert not any("fewer channels went" in said for said in caplog.messages)
