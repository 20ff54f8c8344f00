"""What whole layers are chosen by: each criterion finds the layer that is worthless to it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import slimfront as sf
from slimfront.trainables.compaction import Compaction, compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import WholeLayer, whole_layers
from slimfront.trainables.depth import CRITERIA, Batch, find_criterion
from slimfront.trainables.depth.target import Judge, Target
from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties.cka import pairwise_cka

X = torch.randn(32, 6, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(torch.relu(self.first(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


@pytest.fixture
def network() -> Blocks:
    torch.manual_seed(0)
    made = Blocks().eval()
    with torch.no_grad():
        for block in made.blocks:
            block.norm.weight.fill_(2.0)
    return made


def worth_of(network: nn.Module, name: str) -> dict[str, tuple[float, WholeLayer]]:
    """What each layer that can go is worth, by name."""
    graph = traced_in_both_modes(network, X[:3])
    with torch.no_grad():
        judge = find_criterion(name)(graph, [Batch(X[:20], Y[:20]), Batch(X[20:], Y[20:])], loss)
        layers = whole_layers(graph, X[:3])
        found = judge.worth(graph, layers)
    return {layer.name: (worth, layer) for worth, layer in zip(found, layers, strict=True)}


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def test_each_criterion_has_a_test_here() -> None:
    assert set(CRITERIA) == {"outputs", "loss", "cosine", "cka", "entropy", "batch_norm"}


@pytest.mark.parametrize("name", ["outputs", "loss", "cosine", "cka", "batch_norm"])
def test_a_branch_that_adds_nearly_nothing_goes_first(network: Blocks, name: str) -> None:
    with torch.no_grad():
        network.blocks[1].norm.weight.fill_(1e-3)
    # That this block helps, by as little as it adds, is not what is tried here.
    targets = network(X).argmax(1)
    pairs = [(X, targets)] if name == "loss" else [X]
    made = sf.prune(network, pairs, layers=1, criterion=name, loss=loss if name == "loss" else None)
    went = [step for step in made.report.steps if step[1] == "pruned"]
    assert [step[0] for step in went] == ["blocks.1.second"]
    before = sf.measure(network, X)["layers"]
    assert made.report.after["layers"] == before - 2


def test_activations_that_never_change_sides_go_first(network: Blocks) -> None:
    with torch.no_grad():
        network.blocks[2].first.bias.fill_(100.0)
    found = worth_of(network, "entropy")
    assert found["blocks.2.second"][0] == 0.0
    assert all(found[f"blocks.{number}.second"][0] > 0.5 for number in (0, 1))
    made = sf.prune(network, [X], layers=1, criterion="entropy")
    assert made.report.steps[0][0].startswith("blocks.2.")
    assert "the entropy of its activations is 0.000 bits" in made.report.steps[0][2]


def test_similarities_are_those_of_the_features_at_both_ends(network: Blocks) -> None:
    with torch.no_grad():
        before = network.blocks[0](X)
        after = network.blocks[1](before)
    flat = before.flatten(1), after.flatten(1)
    cosine = float(F.cosine_similarity(*flat, dim=1).mean())
    assert worth_of(network, "cosine")["blocks.1.second"][0] == pytest.approx(1 - cosine, abs=1e-5)
    by_batch = []
    for part in (slice(20), slice(20, None)):
        features = [flat[0][part], flat[1][part]]
        by_batch.append(float(pairwise_cka(features, unbiased=False)[0, 1]))
    cka = (20 * by_batch[0] + 12 * by_batch[1]) / 32
    assert worth_of(network, "cka")["blocks.1.second"][0] == pytest.approx(1 - cka, abs=1e-5)


def test_the_entropy_is_that_of_being_positive(network: Blocks) -> None:
    with torch.no_grad():
        seen = network.blocks[0].first(X)
    share = (seen > 0).double().mean((0, 2, 3))
    bits = -(share * share.log2() + (1 - share) * (1 - share).log2())
    found = worth_of(network, "entropy")["blocks.0.second"][0]
    assert found == pytest.approx(float(bits.mean()), abs=1e-6)


def test_the_loss_and_the_scale_are_what_they_say(network: Blocks) -> None:
    with torch.no_grad():
        x = network.blocks[1](network.blocks[0](X))
        without = loss(network.head(x.mean((2, 3))), Y)
    found = worth_of(network, "loss")["blocks.2.second"][0]
    assert found == pytest.approx(float(without), rel=1e-5)
    scales = worth_of(network, "batch_norm")
    assert scales["blocks.0.second"][0] == pytest.approx(2.0)


class Plain(nn.Module):
    """Layers of one width, without a norm; the second is nearly the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("name", ["outputs", "cosine", "cka"])
def test_a_layer_between_activations_that_changes_nothing_goes_first(name: str) -> None:
    torch.manual_seed(0)
    network = Plain().eval()
    with torch.no_grad():
        network.layers[1].weight.copy_(torch.eye(6) + 1e-3 * torch.randn(6, 6))
        network.layers[1].bias.zero_()
    made = sf.prune(network, [torch.randn(64, 6)], layers=1, criterion=name)
    assert made.report.steps[0][:2] == ("layers.1", "pruned")
    assert made.report.after["layers"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 1, "criterion": "cosin"}, "there is no criterion 'cosin'; did you mean"),
        (
            {"channels": 0.5, "criterion": "cka"},
            r"criterion='cka' judges whole layers, and channels=0.5 is given",
        ),
        ({"layers": 1, "criterion": "loss"}, "the criterion 'loss' needs loss="),
        (
            {"layers": 1, "criterion": "batch_norm"},
            r"the criterion 'batch_norm' says nothing of what could go \('layers.0', .*\); take",
        ),
    ],
)
def test_what_a_criterion_cannot_do_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sf.prune(Plain().eval(), [torch.randn(8, 6)], **options)


@pytest.mark.parametrize("name", ["cosine", "cka", "entropy"])
def test_tokens_and_one_example_are_judged_too(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    network = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    made = sf.prune(network, [torch.randn(1, 5, 8)], layers=1, criterion=name)
    assert [step[1] for step in made.report.steps].count("pruned") == 1
    assert math.isfinite(sf.measure(made.network, torch.randn(1, 5, 8))["params"])


@pytest.mark.parametrize("shape", [(64, 8), (64, 6, 8)])
def test_the_entropy_of_tokens_is_of_their_features(shape: tuple[int, ...]) -> None:
    """Features that are always on, or always off, are linear, and not half on at each token."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.activation, self.down = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = x + self.down(self.activation(self.up(x)))
            return made

    torch.manual_seed(0)
    network = nn.Sequential(Block(), Block(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        network[0].up.bias.copy_(torch.tensor([20.0] * 4 + [-20.0] * 4))
        network[1].up.bias.fill_(0.5)
    made = sf.prune(network, [torch.randn(shape)], layers=1, criterion="entropy")
    name, _, detail = made.report.steps[0]
    assert name == "0.up"
    assert "the entropy of its activations is 0.000 bits" in detail


class Wave(nn.Module):
    """Steps whose sums are read, and whose last residual output is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(1, 8, 1), nn.Conv1d(8, 1, 1)
        self.heard = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Any = 0
        for heard, skip, residual in zip(self.heard, self.skips, self.residuals, strict=True):
            made = heard(x).tanh()
            found = found + skip(made)
            x = x + residual(made)
        out: Tensor = self.last(found.relu())
        return out


@pytest.mark.parametrize("criterion", ["outputs", "cosine", "cka"])
def test_what_nothing_reads_is_not_among_what_may_go(criterion: str) -> None:
    made = sf.prune(Wave().eval(), [torch.randn(16, 1, 20)], layers=1, criterion=criterion)
    name, action, _ = made.report.steps[0]
    assert action == "pruned"
    assert name in ("residuals.0", "residuals.1")


def test_activations_of_an_exported_network_are_known() -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    network = ViTForImageClassification(config).eval()
    images = {"pixel_values": torch.randn(32, 1, 8, 8)}
    made = sf.prune(network, [images], layers=1, criterion="entropy", output="logits")
    name, _, detail = made.report.steps[0]
    assert name.endswith("mlp.fc1")
    assert "so that it merges into" in detail
    assert made.measures["layers"] == sf.measure(network, images)["layers"] - 1


def test_a_target_is_of_the_network_as_the_options_make_it_compact() -> None:
    """A multiple keeps more channels, which a target of parameters counts."""
    torch.manual_seed(0)
    network = Blocks().eval()
    with torch.no_grad():
        for block in network.blocks:
            block.first.weight[:3] = 0
            block.first.bias[:3] = 0
    as_it_is = compact(network, X).measures["params"]
    target = Target(params=int(as_it_is))
    assert Judge(target, network, X, None).missed(network) == []
    assert Judge(target, network, X, None, Compaction(multiple=4)).missed(network) != []
