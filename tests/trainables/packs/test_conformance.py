"""A candidate in a pack is the same candidate alone: for every penalty, in both forms, every
sparsifier and optimiser."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slimfront import Candidate
from slimfront.trainables.packs import Pack
from slimfront.trainables.sparsifiers import SPARSIFIERS
from tests.trainables.packs.made import (
    CONVOLUTIONS,
    FORMS,
    MLP,
    TRANSFORMER,
    assert_histories_same,
    assert_same,
    candidates,
    trained_alone,
    trained_together,
    with_target,
)


def assert_pack_is_as_alone(made: list[Candidate]) -> None:
    for candidate, (member, history) in zip(
        made, trained_together(Pack(made)).items(), strict=True
    ):
        alone, expected = trained_alone(candidate)
        assert_histories_same(history, expected)
        assert_same(member, alone)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_penalty_in_a_pack_is_as_alone(name: str, form: str | None) -> None:
    same: dict[str, Any] = {"form": form} if form else {"every": 2}
    strengths = [{"strength": 0.3, "warmup": 1}, {"strength": 0.05, "ramp": 4}, {"strength": 0.0}]
    options = [{"penalties": {name: same | own}} for own in strengths]
    assert_pack_is_as_alone(candidates(model=CONVOLUTIONS, options=options))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adam") for name in sorted(SPARSIFIERS)), ("lottery", "sgd"), ("rigl", "sgd")],
)
def test_every_sparsifier_in_a_pack_is_as_alone(name: str, optimizer: str) -> None:
    options = [{"sparsifier": with_target(name, number)} for number in range(3)]
    assert_pack_is_as_alone(
        candidates(model=CONVOLUTIONS, options=options, optimizer=optimizer, schedule="cosine")
    )


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    "model", [MLP, {"name": "resnet20", "depth": 8, "width": 2}], ids=["mlp", "resnet"]
)
def test_every_optimiser_in_a_pack_is_as_alone(optimizer: str, model: dict[str, Any]) -> None:
    own = [
        {"weight_decay": 0.1, "schedule": "cosine"},
        {"momentum": 0.0, "epochs": 7},
        {"momentum": 0.5, "weight_decay": 1e-3},
    ]
    assert_pack_is_as_alone(
        candidates(model=model, options=[{"training": each} for each in own], optimizer=optimizer)
    )


def test_distillation_in_a_pack_is_as_alone(tmp_path: Path) -> None:
    teacher, _ = trained_alone(candidates(1, model=CONVOLUTIONS)[0], 2)
    torch.save(teacher.model.state_dict(), tmp_path / "teacher.pt")
    distill = {"teacher": str(tmp_path / "teacher.pt"), "weight": 0.7}
    options = [{"distill": distill, "sparsifier": with_target("set", n)} for n in range(3)]
    assert_pack_is_as_alone(candidates(model=CONVOLUTIONS, options=options))


def test_members_may_have_different_sparsifiers_optimisers_and_several_penalties() -> None:
    penalties = [
        {"layer": {"strength": s}, "connection": {"strength": s / 100}, "cka": {"strength": s / 10}}
        for s in (1.0, 0.1, 0.0)
    ]
    # Not RigL: pixels that are blank in all images have gradients of one size, and rounding would
    # decide which of them it grows.
    sparsifiers = [
        {"sparsifier": None},
        {"sparsifier": with_target("set", 1)},
        {"sparsifier": with_target("magnitude", 2)},
    ]
    own = [
        {"penalties": p, "training": {"optimizer": o}} | s
        for p, s, o in zip(penalties, sparsifiers, ("adam", "sgd", "adamw"), strict=True)
    ]
    assert_pack_is_as_alone(candidates(options=own))


@pytest.mark.parametrize(
    "order", [("connection", "layer"), ("layer", "connection")], ids=" then ".join
)
def test_proximal_steps_are_taken_in_the_order_of_the_penalties(order: tuple[str, ...]) -> None:
    full = {"connection": 0.03, "layer": 3.0}
    options = [
        {"penalties": {name: {"strength": full[name] * share} for name in order}}
        for share in (1.0, 0.3)
    ]
    assert_pack_is_as_alone(candidates(2, options=options))


def test_a_single_layer_may_have_a_strength_of_its_own() -> None:
    own = [
        {"penalties": {"layer": {"layers": {"3": 5.0}}}},
        {"penalties": {"layer": {"strength": 0.5, "layers": {"5": 0}}}},
    ]
    assert_pack_is_as_alone(candidates(2, options=own))


def test_strengths_may_be_relative_to_what_each_begins_with() -> None:
    own = [
        {"penalties": {"layer": {"strength": strength, "relative": True}}} for strength in (0.5, 2)
    ]
    assert_pack_is_as_alone(candidates(2, options=own))


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_a_transformer_in_a_pack_is_as_alone() -> None:
    options = [
        {"penalties": {"channel": {"strength": s}}, "sparsifier": with_target("channels", 0)}
        for s in (0.01, 0.1)
    ]
    assert_pack_is_as_alone(candidates(2, TRANSFORMER, options, epochs=2))


def test_a_pack_of_one_is_as_alone() -> None:
    assert_pack_is_as_alone(candidates(1))
