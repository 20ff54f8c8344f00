"""Channel sparsity: what is zeroed goes, through additions, concatenations, grouped and depthwise
convolutions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MODELS
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.head_groups import HeadGroup
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
        for i in ("norm", "batch-norm", "taylor")
        if (n, i) != ("mlp", "batch-norm")
    ],  # it has none
)
@pytest.mark.parametrize("compare", ["global", "group"])
def test_half_of_the_channels_are_zeroed_and_compaction_removes_them_for_real(
    name: str, importance: str, compare: str
) -> None:
    model = build(name)
    active = trained(name, model, importance=importance, compare=compare)
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
        UserError, match="batch-norm needs a batch norm behind each layer; take norm or taylor"
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
    active = with_sparsity("channels", 1 / 60, start=0.0, end=0.0, importance="norm").attach(
        Setting(
            model,
            sgd(model),
            STEPS,
            0,
            lambda count: (torch.randn(count, 20), torch.zeros(count)),
            nn.functional.cross_entropy,
        )
    )
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


@pytest.mark.parametrize("importance", ["norm", "taylor"])
@pytest.mark.parametrize("compare", ["global", "group"])
def test_whole_heads_of_attention_are_zeroed_and_compaction_removes_them_for_real(
    importance: str, compare: str
) -> None:
    model = build("transformer")
    active = trained("transformer", model, importance=importance, compare=compare)
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
    active = trained("transformer", model, 0.25, importance="norm", exclude=only)
    assert [group.name for group in active.groups] == ["blocks.1.attention"]  # type: ignore[attr-defined]
    gone = (~active.masks["blocks.1.attention.in_proj_weight"].any(1)).nonzero().flatten()
    assert gone.tolist() == [start + row for start in (0, 16, 32) for row in range(8, 12)]


def test_importance_by_batch_norm_is_refused_for_heads() -> None:
    with pytest.raises(
        UserError, match="batch-norm needs a batch norm behind each layer; take norm or taylor"
    ):
        attached(
            "transformer",
            build("transformer"),
            importance="batch-norm",
            exclude=("blocks.0.up", "blocks.1.up"),
        )
