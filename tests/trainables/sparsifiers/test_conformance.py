"""What every sparsifier must do, whatever it is."""

import io
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers import SPARSIFIERS, ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.sparsifiers.masks import layer_densities
from tests.trainables.networks import Transformer
from tests.trainables.sparsifiers.made import STEPS, attach, network, sgd, train, with_sparsity

NAMES = sorted(SPARSIFIERS)
# `channels` counts channels and drops whole rows, biases too: test_channels.py.
OF_WEIGHTS = [name for name in NAMES if name != "channels"]
# N:M masks have sparsities of their own, and no densities of layers.
TARGETS = [
    (name, s)
    for name in OF_WEIGHTS
    for s in ((0.5, 0.75, 0.9) if name == "nm" else (0.0, 0.5, 0.9, 0.95, 0.99))
]
DENSITIES = [
    (name, densities)
    for name in NAMES
    if (field := SPARSIFIERS[name].model_fields.get("densities"))
    for densities in get_args(field.annotation)
    if densities != "global"
]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def trained(
    name: str, sparsity: float, *, seed: int = 0, optimizer: Any = sgd, **options: Any
) -> ActiveSparsifier:
    active = attach(with_sparsity(name, sparsity, **options), seed=seed, optimizer=optimizer)
    train(active)
    return active


def dropped(active: ActiveSparsifier) -> int:
    return sum(int((~mask).sum()) for mask in active.masks.values())


def test_all_but_nm_offer_uniform_and_erk_densities() -> None:
    assert {name for name, _ in DENSITIES} == set(OF_WEIGHTS) - {"nm"}
    assert len(DENSITIES) == 2 * (len(OF_WEIGHTS) - 1)


@pytest.mark.parametrize(("name", "sparsity"), TARGETS)
def test_the_target_is_met_to_within_one_weight_per_tensor(name: str, sparsity: float) -> None:
    active = trained(name, sparsity)
    weights = prunable_weights(active.setting.model)
    total = sum(w.numel() for w in weights.values())
    assert abs(dropped(active) - sparsity * total) <= len(weights)
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert zeros >= dropped(active)


@pytest.mark.parametrize(("name", "densities"), DENSITIES)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_the_densities_of_the_layers_equal_the_closed_form(
    name: str, densities: str, sparsity: float
) -> None:
    active = trained(name, sparsity, densities=densities)
    closed = layer_densities({n: w.shape for n, w in active.weights.items()}, sparsity, densities)  # type: ignore[arg-type]
    for layer, mask in active.masks.items():
        assert abs(int(mask.sum()) - closed[layer] * mask.numel()) <= 1


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_through_momentum_and_weight_decay(name: str, optimizer: Any) -> None:
    active = attach(with_sparsity(name, 0.8), optimizer=optimizer)

    def watch(step: int) -> None:
        for layer, mask in active.masks.items():
            weight = active.weights[layer]
            assert not weight[~mask].any()
            for moment in active.setting.optimizer.state.get(weight, {}).values():
                if moment.shape == weight.shape:
                    assert not moment[~mask].any(), (
                        f"step {step}: the optimiser remembers a dropped weight"
                    )

    train(active, watch=watch)
    assert dropped(active)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_mask_and_the_weights_that_stay_are_trained(name: str) -> None:
    first, second = trained(name, 0.8), trained(name, 0.8)
    assert all(torch.equal(first.masks[key], second.masks[key]) for key in first.masks)
    start = dict(network().named_parameters())
    assert any((first.weights[key] != start[key])[first.masks[key]].any() for key in first.masks)


@pytest.mark.parametrize("name", ["random", "set", "rigl", "granet"])
def test_another_seed_gives_another_random_start(name: str) -> None:
    first, second = (attach(with_sparsity(name, 0.8), seed=seed) for seed in (0, 1))
    assert any(not torch.equal(first.masks[key], second.masks[key]) for key in first.masks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("middle", [3, 15, 35])
def test_a_continued_run_equals_an_uninterrupted_one(name: str, middle: int) -> None:
    whole = trained(name, 0.8)
    half = attach(with_sparsity(name, 0.8))
    train(half, (0, middle))
    file = io.BytesIO()
    state = {
        "model": half.setting.model.state_dict(),
        "optimizer": half.setting.optimizer.state_dict(),
        "sparsifier": half.state_dict(),
    }
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # Nothing may depend on the seed of the second process.
    continued = attach(with_sparsity(name, 0.8), seed=5)
    continued.setting.model.load_state_dict(saved["model"])
    continued.setting.optimizer.load_state_dict(saved["optimizer"])
    continued.load_state_dict(saved["sparsifier"])
    train(continued, (middle, STEPS))
    for a, b in zip(
        whole.setting.model.parameters(), continued.setting.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(whole.masks[key], continued.masks[key]) for key in whole.masks)
    assert whole.progress(STEPS - 1) == continued.progress(STEPS - 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_does_not_change_when_training_goes_on(name: str) -> None:
    active = attach(with_sparsity(name, 0.8))
    train(active, (0, 10))
    state = active.state_dict()
    before = {key: mask.clone() for key, mask in state["masks"].items()}
    train(active, (10, STEPS))
    assert all(torch.equal(state["masks"][key], before[key]) for key in before)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_biases_are_never_dropped(name: str) -> None:
    active = trained(name, 0.9)
    assert all(key.endswith("weight") for key in active.masks)
    assert all(
        module.bias.all()
        for module in active.setting.model.modules()
        if isinstance(module, nn.Linear)
    )


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_excluded_layers_stay_dense_and_the_target_is_of_the_others(name: str) -> None:
    active = trained(name, 0.5, exclude=("first", "4"))
    assert list(active.masks) == ["2.weight"]
    assert abs(dropped(active) - 0.5 * 800) <= 1
    assert prunable_weights(active.setting.model)["0.weight"].all()


@pytest.mark.parametrize("name", NAMES)
def test_excluding_a_layer_that_is_not_there_is_refused_and_so_is_excluding_all(name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"sparsifier\.exclude: 'head' is not a linear or convolutional layer; known: 0, 2, 4",
    ):
        attach(with_sparsity(name, 0.5, exclude=("head",)))
    with pytest.raises(UserError, match="or all are excluded"):
        attach(with_sparsity(name, 0.5, exclude=("first", "2", "last")))


@pytest.mark.parametrize("name", NAMES)
def test_progress_runs_from_zero_to_one(name: str) -> None:
    active = attach(with_sparsity(name, 0.5))
    assert active.progress(0) == 0
    assert active.progress(STEPS) == 1
    assert all(0 <= active.progress(step) < 1 for step in range(STEPS))


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_the_projections_of_attention_take_part_and_can_be_left_out(name: str) -> None:
    model = Transformer()
    within, left_out = (f"blocks.{n}.attention.in_proj_weight" for n in (0, 1))

    def images(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 1, 8, 8), torch.zeros(count, dtype=torch.long)

    options = with_sparsity(name, 0.5, exclude=[left_out])
    active = options.attach(
        Setting(model, sgd(model), STEPS, 0, images, nn.functional.cross_entropy)
    )
    assert active.masks.keys() == prunable_weights(model).keys() - {left_out}
    assert within in active.masks
