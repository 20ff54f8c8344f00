"""The compact network drops in training mode what the model drops there, and says where it
cannot."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.shipping.formats import why_not_exported
from slimfront.trainables.shipping.network_file import check_storable

INPUTS = torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(1))
DROPOUTS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "dropout": lambda x, on: F.dropout(x, 0.5, on),
    "by name": lambda x, on: F.dropout(x, p=0.5, training=on),
    "in training alone": lambda x, on: F.dropout(x) if on else x,
    "share": lambda x, on: F.dropout(x, 0.5 if on else 0.0),
    "torch": lambda x, on: torch.dropout(x, 0.5, on),
    "channels": lambda x, on: F.dropout1d(x, 0.5, on),
    "alpha": lambda x, on: F.alpha_dropout(x, 0.5, on),
    "feature alpha": lambda x, on: F.feature_alpha_dropout(x, 0.5, on),
    "attention": lambda x, on: F.scaled_dot_product_attention(
        x, x, x, dropout_p=0.5 if on else 0.0
    ),
}


class Dropping(nn.Module):
    """Dropout by a function between two layers."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(48, 5), function

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, 8) to (N, 5)."""
        out: Tensor = self.second(
            self.function(torch.relu(self.first(x)), self.training).flatten(1)
        )
        return out


def spread_of_runs(network: nn.Module, inputs: Tensor = INPUTS) -> float:
    torch.manual_seed(0)
    with torch.no_grad():
        return float((network(inputs) - network(inputs)).abs().max())


@pytest.mark.parametrize("name", DROPOUTS)
def test_functional_dropout_follows_the_mode_of_the_compact_network(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Dropping(DROPOUTS[name]).eval()
    check_storable(model, INPUTS)
    network = compact(model, INPUTS).network
    stored = deserialise(serialise(network))  # type: ignore[arg-type]
    for each in (network, stored):
        assert spread_of_runs(each.eval()) == 0
        torch.testing.assert_close(each(INPUTS), model.eval()(INPUTS))
        assert spread_of_runs(each.train()) > 0
        outputs = [(torch.manual_seed(3), kept.train()(INPUTS))[1] for kept in (model, each)]
        torch.testing.assert_close(outputs[1], outputs[0])
    assert why_not_exported(network.eval(), INPUTS) is None
    assert not [record for record in caplog.records if record.name.startswith("slimfront")]


def test_what_else_training_mode_does_is_named_before_it_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Depth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand_like(x[:, :1, :1]) > 0.5) if self.training else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.path, self.head = nn.Linear(8, 8), Depth(), nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.path(self.first(x)).flatten(1))
            return out

    with caplog.at_level(logging.WARNING):
        compact(Outer(), INPUTS)
    assert (
        "in training mode 'path' (Depth) does something else, which compaction keeps only where"
        in caplog.text
    )


class Drawing(nn.Module):
    """What is drawn in training mode, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x.flatten(1)[:, :8])
        if self.training:
            x = x + torch.randn_like(x)
        made: Tensor = self.decoder(x)
        return made


class Beside(nn.Module):
    """A head that is read in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.beside = nn.Sequential(nn.Sequential(nn.Linear(8, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1)[:, :8]).relu()
        made: Tensor = self.head(x)
        if self.training:
            made = made + self.beside(x)
        return made


@pytest.mark.parametrize("kind", [Drawing, Beside])
def test_the_module_whose_code_it_is_is_named(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        compact(kind(), INPUTS)
    assert f"in training mode {kind.__name__}.forward does something else" in caplog.text


def test_a_network_that_can_be_traced_in_evaluation_mode_alone_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        compact(Dropping(lambda x, on: x * (torch.rand(len(x), 1, 1) > 0.5) if on else x), INPUTS)
    assert "in training mode Dropping.forward does something else" in caplog.text


def test_statistics_do_not_change_while_the_network_is_traced_for_training() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), Own(8), nn.Linear(8, 5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = compact(model, INPUTS).network
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(network(INPUTS), model.eval()(INPUTS))


class NormedByFunction(nn.BatchNorm1d):
    """A batch norm whose own code calls the function, and an activation, as timm's do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) to (N, 8)."""
        statistics = self.running_mean, self.running_var
        out: Tensor = self.act(
            F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)
        )
        return out


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) to (N, 8)."""
        return F.dropout(x, 0.5, self.training)


def test_a_batch_norm_by_a_function_keeps_its_statistics_beside_dropout() -> None:
    torch.manual_seed(0)
    norm = NormedByFunction(8)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 1.5)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(48, 8), norm, nn.Linear(8, 8)),
        *(Dropout(), nn.ReLU(), nn.Linear(8, 5)),
    ).eval()
    network = compact(model, INPUTS).network
    torch.testing.assert_close(network(INPUTS), model(INPUTS))
    assert spread_of_runs(network.train()) > 0


def test_a_product_with_one_vector_is_no_layer() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(6, 5)
            self.score = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.hidden(x)), self.score)

    network, inputs = Scored(), torch.randn(8, 6)
    made = compact(network, inputs).network
    torch.testing.assert_close(made(inputs), network(inputs))


class OddSizes(nn.Module):
    """A batch norm beside a choice by the size of images, which torch.export sees through."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, 5)."""
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = self.first(x)
        x = x + self.second(self.norm(x).relu())
        out: Tensor = self.out(x.relu().mean((2, 3)))
        return out


class Blurred(nn.Module):
    """A constant is made in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, 5)."""
        x = (self.first(x) - torch.tensor(0.5)) / torch.tensor(0.25)
        x = F.dropout(x.relu(), 0.5, self.training)
        box = torch.ones(3, 3)[None, None].repeat(8, 1, 1, 1)
        out: Tensor = self.out(F.conv2d(x, box, groups=8).mean((2, 3)))
        return out


@pytest.mark.parametrize("kind", [OddSizes, Blurred])
def test_what_does_the_same_in_training_mode_is_not_warned_of(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    images = torch.randn(8, 3, 16, 16)
    network = compact(model, images).network
    assert "in training mode" not in caplog.text
    for mode in (False, True):
        torch.manual_seed(1)
        wanted = model.train(mode)(images)
        torch.manual_seed(1)
        assert torch.allclose(network.train(mode)(images), wanted, atol=1e-4)


class OwnMode(OddSizes):
    """The mode of the batch norm decides by itself what is done."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, 5)."""
        x = super().forward(x)
        return x * 1.5 if self.norm.training else x


class TwoBuffers(nn.Module):
    """Buffers that are equal at first, one for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) to (N, 5)."""
        out: Tensor = self.layer(x) - (self.mean if self.training else self.average)
        return out


@pytest.mark.parametrize(
    ("kind", "inputs"), [(OwnMode, torch.randn(4, 3, 8, 8)), (TwoBuffers, torch.randn(4, 8))]
)
def test_what_does_something_else_in_training_mode_is_warned_of(
    kind: type[nn.Module], inputs: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    compact(kind().eval(), inputs)
    assert "in training mode" in caplog.text
