"""Pruning of a trained network without training, through `slimfront.prune`."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.models.resnet import BasicBlock
from tests.trainables.networks import Mixed, Transformer, damage_batch_norms
from tests.trainables.test_inputs import Two

CLASSES = 4


class Net(nn.Module):
    """Two convolutions with batch norms, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(16 * 4, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))
        return out


def images(count: int = 96, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise with one bright quarter, which is the class."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(count, channels, 8, 8, generator=draw)
    y = torch.randint(0, CLASSES, (count,), generator=draw)
    for number, place in enumerate(y.tolist()):
        row, column = 4 * (place // 2), 4 * (place % 2)
        x[number, :, row : row + 4, column : column + 4] += 1
    return x, y


def trained(network: nn.Module, steps: int = 60) -> nn.Module:
    x, y = images(channels=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@pytest.fixture
def network() -> nn.Module:
    return trained(Net())


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    x, y = images()
    return list(zip(x.split(size), y.split(size), strict=True))


def accuracy(network: nn.Module) -> float:
    x, y = images()
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_a_network_without_layers_can_be_trained_further_before_it_is_made_compact(
    network: nn.Module,
) -> None:
    given = [x for x, _ in batches()]
    made = sf.prune(network, given, layers=1, compaction={"enabled": False})
    norms = [m for m in made.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert made.report.steps[0][1] == "pruned"
    trained(made.network)
    small = sf.compact(made.network, images()[0])
    assert not [m for m in small.network.modules() if isinstance(m, nn.BatchNorm2d)]


def test_unknown_options_of_compaction_are_one_sentence(network: nn.Module) -> None:
    with pytest.raises(sf.UserError, match=r"^prune: compaction: .*enable"):
        sf.prune(network, batches(), layers=1, compaction={"enable": False})


@pytest.mark.parametrize("by_loss", [False, True])
@pytest.mark.parametrize("how", [{"channels": 0.5}, {"weights": 0.8}, {"layers": 1}])
def test_the_network_gets_smaller_and_the_one_that_was_given_stays(
    network: nn.Module, how: dict[str, Any], by_loss: bool
) -> None:
    network.train()
    network.bn1.eval()
    before = snapshot(network)
    network.conv1.weight.requires_grad_(False)
    given: Any = batches() if by_loss else [x for x, _ in batches()]
    loss = nn.functional.cross_entropy if by_loss else None
    with torch.no_grad():  # as a notebook may have it
        made = sf.prune(network, given, loss=loss, **how)
    assert isinstance(made, sf.Compacted)
    assert made.report.after == pytest.approx(sf.measure(made.network, images()[0]))
    assert made.report.after["nonzero_params"] < 0.9 * count(network)
    assert not made.network.training
    with torch.no_grad():
        assert made.network(images()[0]).shape == (96, CLASSES)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert network.training
    assert not network.bn1.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.conv1.weight.requires_grad
    steps = [step for step in made.report.steps if step[1] == "pruned"]
    assert steps
    assert made.report.steps[: len(steps)] == tuple(steps)


def test_a_share_of_channels_is_that_share_and_is_named(network: nn.Module) -> None:
    made = sf.prune(network, batches(), channels=0.5, loss=nn.functional.cross_entropy)
    said = {name: text for name, action, text in made.report.steps if action == "pruned"}
    gone = sum(int(text.split(" of ")[0]) for text in said.values())
    total = 8 + 16 + 32
    assert gone == total // 2
    assert set(said) <= {"conv1", "conv2", "fc1"}
    assert made.report.after["params"] < 0.6 * count(network)
    assert accuracy(network) > 0.95
    assert accuracy(made.network) > 0.8


def test_a_share_of_weights_is_that_share(network: nn.Module) -> None:
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    total = sum(weight.numel() for weight in weights)
    made = sf.prune(network, [images()[0]], weights=0.9)
    said = [text for _, action, text in made.report.steps if action == "pruned"]
    assert sum(int(text.split(" of ")[0].replace(",", "")) for text in said) == round(0.9 * total)
    assert made.report.after["nonzero_params"] < 0.15 * count(network)


def test_gradients_find_the_channels_that_the_loss_needs() -> None:
    """Large weights of a unit that the loss does not see go first by Taylor, and last by norm."""
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(4) * torch.tensor([[1.0], [1.1], [1.2], [9.0]]))
        network[0].bias.zero_()
        network[2].weight.fill_(0.5)
        network[2].weight[0] = torch.tensor([1.0, 2.0, 3.0, 0.0])
        network[2].weight[1:, 3] = 5
    inputs = torch.rand(32, 4) + 0.5

    def first(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs[:, 0] - targets) ** 2).mean()

    pairs = [(inputs, torch.zeros(32))]
    by_loss = sf.prune(network, pairs, channels=0.25, loss=first)
    by_norm = sf.prune(network, [inputs], channels=0.25)
    assert abs(by_loss.network(inputs)[:, 0] - network(inputs)[:, 0]).max() < 1e-5
    assert abs(by_norm.network(inputs)[:, 0] - network(inputs)[:, 0]).max() > 0.1


def test_statistics_of_batch_norms_are_taken_again_unless_told_not_to(network: nn.Module) -> None:
    x = [each for each, _ in batches()]
    fresh = sf.prune(network, x, channels=0.5, fit=False)
    kept = sf.prune(network, x, channels=0.5, fit=False, recalibrate=False)
    with torch.no_grad():
        assert not torch.allclose(fresh.network(x[0]), kept.network(x[0]))
    damaged = copy.deepcopy(network)
    damaged.bn1.running_mean += 5
    repaired = sf.prune(damaged, x, weights=0.01, fit=False)
    assert accuracy(damaged) < 0.7
    assert accuracy(repaired.network) > 0.9


class Deep(nn.Module):
    """Three layers of one width between activations, the second of which is nearly the
    identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.inner = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        with torch.no_grad():
            for layer, noise in zip(self.inner, (0.5, 0.01, 1.0), strict=True):
                layer.weight.copy_(torch.eye(5) + noise * torch.randn(5, 5))
                layer.bias.copy_(noise * torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.inner:
            x = torch.relu(layer(x))
        out: Tensor = self.last(x)
        return out


def test_the_layer_that_changes_the_outputs_least_goes_first_and_is_named() -> None:
    network = Deep()
    x = torch.randn(64, 6)
    made = sf.prune(network, [x], layers=1)
    assert made.report.steps[0][:2] == ("inner.1", "pruned")
    assert made.report.after["layers"] == 4
    with torch.no_grad():
        assert (made.network(x) - network(x)).abs().max() < 0.2
    two = sf.prune(network, x.split(16), layers=2)
    assert two.report.steps[0][0] == "inner.1"
    assert two.report.after["layers"] == 3


def test_blocks_of_a_residual_network_go_whole() -> None:
    blocks = [BasicBlock(8, 8, 1) for _ in range(3)]
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(512, CLASSES)
    )
    network = trained(network, 20)
    with torch.no_grad():
        blocks[1].bn2.weight.mul_(1e-3)
        blocks[1].bn2.bias.mul_(1e-3)
    single = [f"{place}.conv1" for place in (2, 3, 4)]
    loss = nn.functional.cross_entropy
    made = sf.prune(network, batches(), layers=1, loss=loss, exclude=single)
    name, action, text = made.report.steps[0]
    assert (name, action) == ("3.conv2", "pruned")
    assert "residual" in text
    assert made.report.after["layers"] == 8 - 2
    assert accuracy(made.network) > accuracy(network) - 0.05


def test_attention_and_perceptrons_of_a_transformer_go_whole() -> None:
    network = Transformer().eval()
    x = torch.randn(16, 1, 8, 8)
    before = sf.measure(network, x)["layers"]
    made = sf.prune(network, [x], layers=2)
    assert made.report.after["layers"] <= before - 2
    assert sum(step[1] == "pruned" for step in made.report.steps) == 2


class Encoder(nn.Module):
    """Torch's own layers, whose branches end in dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


def test_branches_that_end_in_dropout_go_whole() -> None:
    network = Encoder().eval()
    x = torch.randn(8, 5, 16)
    before = sf.measure(network, x)["layers"]
    stay = [f"encoder.layers.{number}.linear1" for number in range(2)]
    made = sf.prune(network, [x], layers=4, exclude=stay)
    assert made.report.after["layers"] == before - 2 * 6
    assert len({step[0] for step in made.report.steps if step[1] == "pruned"}) == 4


@pytest.mark.parametrize("form", ["named", "placed"])
@pytest.mark.parametrize("how", [{"channels": 0.5}, {"weights": 0.8}])
def test_networks_of_several_inputs_are_called_as_before(form: str, how: dict[str, float]) -> None:
    class Plain(Two):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, z)["out"]

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw)
    z = torch.randint(0, 7, (60, 2), generator=draw)
    network = Plain()
    inputs: Any = {"z": z, "x": x} if form == "named" else (x, z)
    made = sf.prune(network, [inputs], **how)
    out = made.network(z=z, x=x) if form == "named" else made.network(x, z)
    assert out.shape == (60, 2)
    assert made.report.after["nonzero_params"] < count(network)
    targets = (x[:, 0] > 0).long()
    by_loss = sf.prune(network, [(inputs, targets)], loss=nn.functional.cross_entropy, **how)
    assert by_loss.report.after["nonzero_params"] < count(network)


def test_grouped_and_shared_channels_go_together() -> None:
    network = Mixed()
    damage_batch_norms(network)
    network.eval()
    x = torch.randn(32, 3, 8, 8)
    made = sf.prune(network, x.split(8), channels=0.5)
    assert made.report.after["params"] < 0.6 * count(network)


def test_an_iterator_is_read_once_and_excluded_layers_stay(network: nn.Module) -> None:
    def once() -> Iterator[Tensor]:
        yield from (x for x, _ in batches())

    made = sf.prune(network, once(), channels=0.5, exclude=("conv1", "fc1"))
    said = [name for name, action, _ in made.report.steps if action == "pruned"]
    assert said == ["conv2"]
    assert made.network.conv1.out_channels == 8


def test_a_tensor_or_a_mapping_is_one_batch(network: nn.Module) -> None:
    images = torch.cat([x for x, _ in batches()])
    made = sf.prune(network, images, channels=0.5)
    assert made.report.after["params"] < 0.6 * count(network)
    by_name = sf.prune(Named(), {"image": images, "scale": images}, channels=0.5)
    assert by_name.report.after["params"] < 0.6 * count(Named())


class Named(nn.Module):
    """Two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LazyConv2d(16, 3), nn.Linear(16, 2)
        self.first(torch.zeros(1, *next(iter(batches()))[0].shape[1:]))

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(image * scale).relu().mean((2, 3)))
        return made


def test_mistakes_of_the_loss_are_told_in_a_sentence(network: nn.Module) -> None:
    with pytest.raises(sf.UserError, match="prune: the loss raised TypeError: "):
        sf.prune(network, batches(), channels=0.5, loss=lambda outputs: outputs)  # type: ignore[misc, arg-type]


X = torch.randn(8, 1, 8, 8)
Y = torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ([X], {}, "prune: say what goes: one of channels=0.5, weights=0.9, layers=2"),
        ([X], {"channels": 0.5, "layers": 1}, "prune: one of channels, weights and layers"),
        ([X], {"channels": 0.0}, "channels=0.0: it is a share, more than 0 and less than 1"),
        ([X], {"channels": 1}, "channels=1: it is a share, more than 0 and less than 1"),
        ([X], {"weights": -0.5}, "weights=-0.5: it is a share"),
        ([X], {"layers": 0}, "layers=0: it is how many layers go, 1 or more"),
        ([X], {"layers": 1.5}, "layers=1.5: it is how many layers go, 1 or more"),
        ([], {"channels": 0.5}, "prune: there is no batch"),
        ([X[:0]], {"channels": 0.5}, "prune: a batch is empty"),
        (X.tolist(), {"channels": 0.5}, "prune: a batch is a list"),
        ([X], {"channels": 0.5, "loss": nn.functional.cross_entropy}, "(inputs, targets)"),
        ([(X, Y)], {"channels": 0.5}, "with loss=…, a batch is a pair of inputs and targets"),
        ([X], {"channels": 0.005}, "channels=0.005: that is none of the 56 channels"),
        ([X], {"weights": 1e-5}, "weights=1e-05: that is none of the 3,400 weights"),
        ([X], {"layers": 9}, "layers=9: "),
        ([X], {"channels": 0.5, "exclude": ("nowhere",)}, "exclude: 'nowhere' is not a linear"),
        ([X[:, :, :3]], {"channels": 0.5}, "the network cannot be run on the batches"),
        (
            [(X, Y)],
            {"channels": 0.5, "loss": lambda outputs, _: outputs.sum() * float("nan")},
            "the loss is nan, and it is to be finite",
        ),
        (
            [(X, Y)],
            {"channels": 0.5, "loss": lambda outputs, _: outputs},
            "the loss is to be one number",
        ),
    ],
)
def test_what_cannot_be_gets_one_sentence(
    given: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(sf.UserError) as raised:
        sf.prune(Net().eval(), given, **options)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_nothing_can_go_that_is_said() -> None:
    x = torch.randn(8, 4)
    for options, sentence in (
        ({"channels": 0.5}, "channels=0.5: there is no channel in this network"),
        ({"layers": 1}, "layers=1: there is no residual branch and no layer between activations"),
    ):
        with pytest.raises(sf.UserError, match=sentence):
            sf.prune(nn.Sequential(nn.Linear(4, 3)), [x], **options)  # type: ignore[arg-type]
    sparse = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        sparse[0].weight[:6] = 0
        sparse[0].bias[:6] = 0
    with pytest.raises(sf.UserError, match=r"channels=0\.5: 6 of 8 channels are zero already"):
        sf.prune(sparse, [x], channels=0.5)


def test_too_many_layers_are_refused_with_the_names_of_those_that_can_go() -> None:
    with pytest.raises(sf.UserError) as raised:
        sf.prune(Deep(), [torch.randn(8, 6)], layers=7)
    said = str(raised.value)
    assert said.startswith("layers=7: no more than ")
    assert "'inner.1'" in said


def test_few_examples_for_batch_norms_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sf.prune(Net().eval(), [x for x, _ in batches()], channels=0.5)
        assert not caplog.records
        sf.prune(Net().eval(), [X], channels=0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "prune: what is left is not fitted to what the whole network computes, since there are 8 "
        "examples; give at least 16, better some hundreds, or fit=False",
        "the statistics of batch norms are taken again on 8 examples, which are few; give more, or "
        "recalibrate=False",
    ]
