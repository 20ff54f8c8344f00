"""Channel sparsity: what is zeroed goes, through additions, concatenations, grouped and depthwise
convolutions."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MODELS
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.channels import ActiveChannels
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.head_groups import HeadGroup
from slimfront.trainables.training.slimming import Slimming
from tests.trainables.networks import Mixed, Transformer, damage_batch_norms
from tests.trainables.sparsifiers.made import STEPS, network, sgd, train, with_sparsity

SHAPES = {
    "mixed": (3, 8, 8),
    "resnet20": (1, 8, 8),
    "vgg": (1, 8, 8),
    "mlp": (1, 8, 8),
    "transformer": (1, 8, 8),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mixed":
        return Mixed()
    if name == "transformer":
        return Transformer()
    options: dict[str, Any] = {
        "resnet20": {"depth": 14, "width": 8},
        "vgg": {"depth": 11, "width": 8},
        "mlp": {"depth": 4, "width": 32},
    }
    return MODELS[name](name=name, **options[name]).build(SHAPES[name], outputs=5)


def of_vectors(model: nn.Module) -> Setting:
    """A training of a network of 20 inputs."""

    def examples(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 20), torch.zeros(count)

    return Setting(model, sgd(model), STEPS, 0, examples, nn.functional.cross_entropy)


def attached(
    name: str, model: nn.Module, sparsity: float = 0.5, **options: Any
) -> ActiveSparsifier:
    def examples(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, *SHAPES[name]), torch.zeros(count, dtype=torch.long)

    return with_sparsity("channels", sparsity, **options).attach(
        Setting(model, sgd(model), STEPS, 0, examples, nn.functional.cross_entropy)
    )


def trained(name: str, model: nn.Module, sparsity: float = 0.5, **options: Any) -> ActiveSparsifier:
    active = attached(name, model, sparsity, **options)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        inputs, labels = (
            torch.randn(8, *SHAPES[name], generator=generator),
            torch.randint(5, (8,), generator=generator),
        )
        active.setting.optimizer.zero_grad()
        (nn.functional.cross_entropy(model(inputs), labels) * 0.1).backward()
        active.before_step(step)
        active.setting.optimizer.step()
        active.after_step(step)
    return active


@pytest.mark.parametrize(
    ("name", "importance"),
    [
        (n, i)
        for n in list(SHAPES)[:4]
        for i in ("gate", "norm", "batch-norm", "taylor")
        if (n, i) != ("mlp", "batch-norm")
    ],  # it has none
)
@pytest.mark.parametrize("compare", ["global", "group"])
def test_half_of_the_channels_are_zeroed_and_compaction_removes_them_for_real(
    name: str, importance: str, compare: str
) -> None:
    model = build(name)
    active = trained(name, model, importance=importance, compare=compare, of="channels")
    parameters = dict(model.named_parameters())
    units = sum(group.units for group in active.groups)  # type: ignore[attr-defined]
    dead = sum(int((~group.alive(parameters)).sum()) for group in active.groups)  # type: ignore[attr-defined]
    assert abs(dead - units / 2) <= len(active.groups) + 1  # type: ignore[attr-defined]
    inputs = torch.randn(16, *SHAPES[name])
    compacted = compact(model, inputs)
    before, after = measure(model, inputs)["params"], compacted.report.after["params"]
    rows = {
        name: (mask.flatten(1) if mask.dim() > 1 else mask[:, None]).any(1)
        for name, mask in active.masks.items()
    }
    assert any(not kept.all() for kept in rows.values())
    assert after < 0.6 * before
    alive = [p for p in compacted.network.parameters() if p.dim() > 1]
    assert all(bool(p.detach().flatten(1).any(1).all()) for p in alive[:-1]), (
        "a zeroed channel is still there"
    )


def test_each_group_keeps_a_channel_at_any_sparsity() -> None:
    model = build("resnet20")
    active = trained("resnet20", model, 0.99)
    parameters = dict(model.named_parameters())
    assert all(group.alive(parameters).sum() >= 1 for group in active.groups)  # type: ignore[attr-defined]


def test_the_outputs_of_the_network_and_excluded_layers_keep_their_channels() -> None:
    active = attached("mlp", build("mlp"), exclude=("first",))
    written = {name for group in active.groups for name in group.writers}  # type: ignore[attr-defined]
    layers = [
        name
        for name, module in active.setting.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert written == {f"{name}.{kind}" for name in layers[1:-1] for kind in ("weight", "bias")}


def test_importance_by_batch_norm_is_refused_where_there_is_none() -> None:
    with pytest.raises(
        UserError, match="batch-norm needs a batch norm behind each layer; take gate or norm"
    ):
        attached("mlp", build("mlp"), importance="batch-norm")


def test_a_network_with_nothing_to_remove_is_refused() -> None:
    with pytest.raises(UserError, match="no channel in this network that can be removed"):
        attached("mlp", nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))


def test_the_smallest_units_by_norm_go_first() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[7] *= 1e-3
        model[0].bias[7] = 0
        model[2].weight[:, 7] *= 1e-3
    options = {"start": 0.0, "end": 0.0, "importance": "norm", "of": "channels"}
    active = with_sparsity("channels", 1 / 60, **options).attach(of_vectors(model))
    train(active, (0, 2))
    assert [int(row) for row in (~active.masks["0.weight"].any(1)).nonzero()] == [7]
    assert not active.masks["0.bias"][7]
    assert active.masks["2.weight"].all()


def test_batch_norms_that_have_seen_data_do_not_keep_a_zeroed_channel_alive() -> None:
    model = build("resnet20")
    damage_batch_norms(model)
    active = trained("resnet20", model)
    compacted = compact(model, torch.randn(16, 1, 8, 8))
    assert compacted.report.count("units removed")
    assert active.masks


@pytest.mark.parametrize("importance", ["gate", "norm", "taylor"])
@pytest.mark.parametrize("compare", ["global", "group"])
def test_whole_heads_of_attention_are_zeroed_and_compaction_removes_them_for_real(
    importance: str, compare: str
) -> None:
    model = build("transformer")
    active = trained("transformer", model, importance=importance, compare=compare, of="channels")
    parameters = dict(model.named_parameters())
    dead = {
        g.name: int((~g.alive(parameters)).sum()) for g in active.groups if isinstance(g, HeadGroup)
    }  # type: ignore[attr-defined]
    assert set(dead) == {"blocks.0.attention", "blocks.1.attention"}
    assert compare == "global" or dead == {"blocks.0.attention": 2, "blocks.1.attention": 2}
    inputs = torch.randn(16, *SHAPES["transformer"])
    compacted = compact(model, inputs)
    left = {
        name.removesuffix(".heads"): m.heads
        for name, m in compacted.network.named_modules()
        if isinstance(m, Attention)
    }
    assert left == {name: 4 - count for name, count in dead.items()}
    assert compacted.report.after["flops"] < 0.8 * measure(model, inputs)["flops"]


def test_the_least_important_head_goes_first_and_an_excluded_attention_keeps_its_heads() -> None:
    model = build("transformer")
    with torch.no_grad():
        for start in (0, 16, 32):
            model.blocks[1].attention.in_proj_weight[start + 8 : start + 12] *= 1e-3  # type: ignore[union-attr, operator, index]
        model.blocks[1].attention.out_proj.weight[:, 8:12] *= 1e-3  # type: ignore[union-attr, operator, index]
    only = ("blocks.0.up", "blocks.1.up", "blocks.0.attention.out_proj")
    active = trained("transformer", model, 0.25, importance="norm", exclude=only, of="channels")
    assert [group.name for group in active.groups] == ["blocks.1.attention"]  # type: ignore[attr-defined]
    gone = (~active.masks["blocks.1.attention.in_proj_weight"].any(1)).nonzero().flatten()
    assert gone.tolist() == [start + row for start in (0, 16, 32) for row in range(8, 12)]


def test_importance_by_batch_norm_is_refused_for_heads() -> None:
    with pytest.raises(
        UserError, match="batch-norm needs a batch norm behind each layer; take gate or norm"
    ):
        attached(
            "transformer",
            build("transformer"),
            importance="batch-norm",
            exclude=("blocks.0.up", "blocks.1.up"),
        )


@pytest.mark.parametrize("of", ["flops", "params"])
@pytest.mark.parametrize("importance", ["gate", "norm"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_a_share_of_the_flops_or_of_the_parameters_goes(
    name: str, importance: str, of: str
) -> None:
    model = build(name)
    inputs = torch.randn(16, *SHAPES[name])
    whole = measure(model, inputs)[of]
    trained(name, model, 0.6, importance=importance, of=of)
    left = compact(model, inputs).report.after[of]
    # What attention itself multiplies is not counted beforehand, and folded batch norms are gone.
    assert 0.3 * whole < left < 0.45 * whole


def test_what_is_cheap_for_its_worth_stays() -> None:
    # The first layer reads 64 inputs, so that a unit of it costs more than one of the second.
    model = build("mlp")
    active = trained("mlp", model, 0.5, of="params", importance="norm")
    left = {group.name: int(group.alive(active.weights).sum()) for group in active.groups}  # type: ignore[attr-defined]
    first, *others = left.values()
    assert first < min(others)


def test_each_group_keeps_a_unit_and_what_is_not_reached_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("resnet20")
    active = trained("resnet20", model, 0.999)
    assert all(group.alive(active.weights).sum() >= 1 for group in active.groups)  # type: ignore[attr-defined]
    (said,) = [r.getMessage() for r in caplog.records if "at most" in r.getMessage()]
    assert "of the FLOPs can go at most" in said
    assert "sparsity 0.999 is not reached" in said


def test_what_stays_is_named_where_other_layers_pay_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = nn.Sequential(
        nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 400), nn.Softmax(-1), nn.Linear(400, 10)
    )
    sf.Slimming(
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        torch.randn(8, 20),
        steps=10,
        sparsifier={"name": "channels", "sparsity": 0.36, "of": "params"},
    ).close()
    (said,) = [message for message in caplog.messages if "at most" in message]
    assert "since the rest of the network stays, mostly '4', '2'; " in said
    assert "sparsity 0.36 leaves hardly anything of the other layers" in said


def test_importance_by_gates_is_the_squared_derivative_of_a_gate_on_each_unit() -> None:
    torch.manual_seed(0)
    gates = [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(5))]
    layers = [nn.Linear(20, 6), nn.Linear(6, 5), nn.Linear(5, 4)]
    inputs, labels = torch.randn(8, 20), torch.randint(4, (8,))
    hidden = inputs
    for layer, gate in zip(layers, gates, strict=False):
        hidden = torch.relu(layer(hidden)) * gate
    loss = nn.functional.cross_entropy(layers[-1](hidden), labels)
    expected = [g.square() for g in torch.autograd.grad(loss, gates)]

    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    active = with_sparsity("channels", 0.5).attach(of_vectors(model))
    nn.functional.cross_entropy(model(inputs), labels).backward()
    assert isinstance(active, ActiveChannels)
    for scores, wanted in zip(active.scores().values(), expected, strict=True):
        torch.testing.assert_close(scores, wanted)


def test_the_gate_of_a_channel_that_several_layers_make_and_read_is_one() -> None:
    """Through batch norms and a residual addition: as if each reader had a gate, all of them the
    same."""
    model = build("resnet20")
    active = attached("resnet20", model)
    assert isinstance(active, ActiveChannels)
    inputs, labels = torch.randn(8, *SHAPES["resnet20"]), torch.randint(5, (8,))
    nn.functional.cross_entropy(model(inputs), labels).backward()
    scores = active.scores()
    parameters = dict(model.named_parameters())
    for group in active.groups:
        assert group.readers
        with torch.no_grad():
            for channel in (0, group.units - 1):
                found = 0.0
                for step in (1e-3, -1e-3):
                    kept = {name: parameters[name].clone() for name in group.readers}
                    for name, owners in group.readers.items():
                        group.columns(name, parameters[name])[owners == channel] *= 1 + step
                    found += nn.functional.cross_entropy(model(inputs), labels).item() / step
                    for name, values in kept.items():
                        parameters[name].copy_(values)
                derivative = scores[group.name][channel].sqrt()
                assert abs(found / 2) == pytest.approx(float(derivative), abs=2e-3, rel=0.1)


def test_importance_by_gates_is_remembered_from_batch_to_batch_and_by_a_checkpoint() -> None:
    model = build("mlp")
    active = trained("mlp", model, of="channels")
    assert isinstance(active, ActiveChannels)
    before = {name: scores.clone() for name, scores in active.gates.items()}
    state = active.state_dict()
    again = attached("mlp", build("mlp"), of="channels")
    assert isinstance(again, ActiveChannels)
    again.load_state_dict(state)
    assert again.gates.keys() == before.keys()
    for name, scores in again.gates.items():
        torch.testing.assert_close(scores, before[name], rtol=0, atol=0)


def test_the_same_share_of_each_group_is_of_channels() -> None:
    with pytest.raises(ValidationError, match="compare: group drops the same share of the chan"):
        with_sparsity("channels", 0.5, compare="group")


class OneMap(nn.Module):
    """Attention to places: the one channel that could go is the last of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, 16, 3, padding=1)
        self.places = nn.Conv2d(2, 1, 3, padding=1)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).relu()
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.out((x * self.places(seen).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("of", ["channels", "params", "flops"])
def test_a_network_of_last_channels_alone_is_refused(of: str) -> None:
    network = OneMap()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    sparsifier = {"name": "channels", "sparsity": 0.5, "of": of}
    with pytest.raises(UserError, match="there is no channel in this network that can be removed"):
        Slimming(network, optimizer, torch.randn(4, 3, 8, 8), steps=5, sparsifier=sparsifier)


def last_update(trained: bool, **options: Any) -> int:
    """The step after which the last channels go, of a hundred."""
    asked = {"name": "channels", "sparsity": 0.5, **options}
    model = network()
    optimizer = sgd(model)
    inputs = torch.randn(8, 20)
    slim = Slimming(model, optimizer, inputs, steps=100, sparsifier=asked, trained=trained)
    assert isinstance(slim.sparsifier, ActiveChannels)
    return slim.sparsifier.updates.last


def test_channels_of_a_trained_network_go_early_unless_it_is_said_when() -> None:
    assert last_update(trained=False) == 70
    assert last_update(trained=True) == 15
    assert last_update(trained=True, end=0.7) == 70
    assert last_update(trained=True, start=0.1) == 70
    with pytest.raises(UserError, match=r"start \(0.8\) is after end \(0.7\)"):
        last_update(trained=True, start=0.8)


def frozen_perceptron(frozen: bool) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU()),
        *(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU()),
        nn.Linear(24, 4),
    )
    if frozen:
        for layer in made[:6]:
            layer.requires_grad_(False)
    return made


def slimmed(frozen: bool, importance: str, *, before_step: bool = True) -> Slimming:
    """After the first channels went, in the first step."""
    model = frozen_perceptron(frozen)
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    slim = Slimming(
        model,
        optimizer,
        inputs,
        steps=4,
        sparsifier={
            **{"name": "channels", "sparsity": 0.5, "of": "params", "importance": importance},
            **{"start": 0.0, "end": 0.0},
        },
    )
    wanted = inputs[:, :4].argmax(1)
    nn.functional.cross_entropy(model(inputs), wanted).backward()
    if before_step:
        slim.before_step()
    optimizer.step()
    slim.after_step()
    return slim


@pytest.mark.parametrize("importance", ["gate", "taylor", "norm"])
def test_channels_of_frozen_layers_are_ranked_as_if_they_were_trained(importance: str) -> None:
    free, frozen = (slimmed(frozen, importance) for frozen in (False, True))
    assert free.sparsifier is not None
    assert frozen.sparsifier is not None
    for name, mask in free.sparsifier.masks.items():
        assert torch.equal(mask, frozen.sparsifier.masks[name])
    before = dict(frozen_perceptron(True).named_parameters())
    for name, parameter in frozen.network.named_parameters():
        assert parameter.requires_grad == before[name].requires_grad
        if not parameter.requires_grad:
            assert parameter.grad is None
            assert torch.equal(parameter[parameter != 0], before[name][parameter != 0])


def test_frozen_layers_are_never_trained_for_being_ranked() -> None:
    with pytest.raises(UserError, match="before_step was not called"):
        slimmed(True, "gate", before_step=False)
    slim = slimmed(True, "gate")
    slim.close()
    assert not any(parameter.requires_grad for parameter in slim.network[:6].parameters())  # type: ignore[index]


def test_snip_counts_frozen_layers_too() -> None:
    masks = []
    for frozen in (False, True):
        model = frozen_perceptron(frozen)
        inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
        slim = Slimming(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            inputs,
            steps=4,
            sparsifier={"name": "snip", "sparsity": 0.5},
            targets=inputs[:, :4].argmax(1),
            loss=nn.functional.cross_entropy,
        )
        assert slim.sparsifier is not None
        masks.append(slim.sparsifier.masks)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


@pytest.mark.parametrize("name", ["rigl", "set", "granet", "magnitude"])
def test_what_cannot_grow_in_frozen_layers_is_said(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = frozen_perceptron(True)
    asked = {"name": name, "sparsity": 0.6, "every": 2}
    Slimming(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        torch.randn(8, 20),
        steps=20,
        sparsifier=asked,
    )
    said = [message for message in caplog.messages if "stays 0" in message]
    assert len(said) == (name != "magnitude")
