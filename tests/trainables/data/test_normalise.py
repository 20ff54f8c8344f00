"""What networks see of their inputs, and that what ships takes them as they come."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from slimfront import Candidate, train
from slimfront.trainables.data import Data, load_once
from slimfront.trainables.data.look import _say_once, check_data
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.latency import Latency
from slimfront.trainables.models import built
from slimfront.trainables.shipping import ship
from slimfront.trainables.shipping.card import card
from slimfront.trainables.shipping.formats import load
from slimfront.trainables.training.rehearsal import rehearse
from tests.marks import often

CPU = torch.device("cpu")
HERE = "tests.trainables.data.test_normalise"


def wine() -> tuple[Any, Any]:
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return x, y


def table(kind: str = "float64") -> tuple[Any, Any]:
    """A constant feature, one that rounding makes nearly constant, a small one and a large one."""
    noise = np.random.default_rng(0).normal(size=(90, 2))
    y = np.arange(90) % 3
    columns = [np.full(90, 7.0), np.full(90, 0.1), noise[:, 0] / 100 + y, 1000 * noise[:, 1] + 5e4]
    return np.stack(columns, 1).astype(kind), y


def series() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 100.0])[:, None]
    return torch.randn(60, 2, 5, generator=generator) * scale + scale, torch.arange(60) % 2


def ids() -> tuple[Tensor, Tensor]:
    return torch.arange(240).reshape(60, 4) % 11, torch.arange(60) % 2


def broken(which: str) -> tuple[Tensor, Tensor]:
    x = torch.ones(60, 3)
    x[8::7, 1] = float(which)
    return x, torch.arange(60) % 2


def data_of(factory: str, **options: Any) -> Data:
    plain = {"name": "factory", "factory": f"{HERE}:{factory}", **options}
    return Candidate.model_validate({"data": plain}).data


def accuracy_on_wine(**options: Any) -> float:
    plain = {
        "data": {"factory": f"{HERE}:wine", **options},
        "model": {"name": "mlp", "depth": 1, "width": 32},
        "training": {"epochs": 30, "batch_size": 16, "lr": 3e-3, "seed": 0},
        "one_shot": {"steps": 0},
    }
    return train(Candidate.model_validate(plain)).measures["val_accuracy"]


def test_tables_are_normalised_feature_by_feature_unless_something_else_is_asked_for() -> None:
    by_feature = accuracy_on_wine()
    assert by_feature > 0.9
    assert accuracy_on_wine(normalise="global") < by_feature - 0.2


@pytest.mark.parametrize(
    ("factory", "how", "shape"),
    [
        ("table", "auto", (1, 4)),
        ("table", "per_feature", (1, 4)),
        ("table", "global", ()),
        ("series", "auto", ()),
        ("series", "per_channel", (2, 1)),
        ("series", "per_feature", (2, 5)),
    ],
)
def test_networks_see_a_mean_of_zero_and_what_ships_takes_inputs_as_they_come(
    factory: str, how: str, shape: tuple[int, ...]
) -> None:
    data = data_of(factory, normalise=how).load()
    plain = data_of(factory, normalise="none").load()
    seen = data.train.inputs
    assert abs(float(seen.mean())) < 1e-3
    if shape:
        over = (0,) if how != "per_channel" else (0, 2)
        assert seen.mean(over).abs().max() < 1e-3
        assert set(seen.std(over).round(decimals=2).flatten().tolist()) <= {0.0, 1.0}
    for name in ("train", "validation", "test"):
        raw, wanted = data.raw(getattr(data, name).inputs), getattr(plain, name).inputs
        assert torch.allclose(raw, wanted, rtol=1e-4, atol=5e-3)
    assert plain.normalised == "none" and plain.normalisation() is None


def test_a_constant_feature_becomes_zero_and_stays_harmless_where_it_varies_later() -> None:
    data = data_of("table").load()
    assert data.train.inputs[:, 0].abs().max() == 0
    assert data.train.inputs[:, 1].abs().max() < 1e-6
    constants = data.normalisation()
    assert constants is not None
    std = constants[1].flatten()
    assert std[:2].tolist() == [1, 1] and std[3] > 500


def test_constants_of_the_users_own_are_used_as_they_are() -> None:
    data = data_of("table", normalise={"mean": [1, 2, 3, 4], "std": 2}).load()
    plain = data_of("table", normalise="none").load()
    wanted = (plain.train.inputs - torch.tensor([1.0, 2, 3, 4])) / 2
    assert torch.allclose(data.train.inputs, wanted)
    assert data.normalised == "by given constants"


@pytest.mark.parametrize(
    ("factory", "how", "message"),
    [
        ("table", "per_channel", r"per_channel, and inputs of the shape \(4,\) have no channels"),
        ("table", {"mean": [1, 2], "std": 1}, r"has 2 numbers, and inputs of the shape \(4,\)"),
    ],
)
def test_what_does_not_fit_the_inputs_is_refused(factory: str, how: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_of(factory, normalise=how).load()


def test_images_are_not_normalised_pixel_by_pixel() -> None:
    images = Candidate.model_validate(
        {
            "data": {
                "factory": "tests.trainables.data.made:image_tensors",
                "normalise": "per_feature",
            }
        }
    ).data
    with pytest.raises(UserError, match="uint8 images are normalised per_channel or global"):
        images.load()


@pytest.mark.parametrize("std", [0, -1, [1, 0, 1, 1]])
def test_a_standard_deviation_of_nothing_is_refused(std: Any) -> None:
    with pytest.raises(ValidationError, match="every standard deviation must be above 0"):
        data_of("table", normalise={"mean": 0, "std": std})


def test_whole_numbers_stay_whole_unless_normalisation_is_asked_for() -> None:
    assert data_of("ids").load().train.inputs.dtype == torch.int64
    assert data_of("ids", normalise="none").load().train.inputs.dtype == torch.int64
    asked = data_of("ids", normalise="per_feature").load()
    assert asked.train.inputs.dtype == torch.float32
    assert torch.equal(
        asked.raw(asked.train.inputs).round().long() % 11,
        asked.raw(asked.train.inputs).round().long(),
    )


def test_a_network_that_takes_no_whole_numbers_says_so_before_training() -> None:
    made = Candidate.model_validate(
        {"data": {"factory": f"{HERE}:table", "args": {"kind": "int64"}}}
    )
    with pytest.raises(UserError, match=r"int64 \(N, 4\), .* set data.normalise to per_feature"):
        rehearse(made)
    rehearse(
        Candidate.model_validate({"data": made.data.model_dump() | {"normalise": "per_feature"}})
    )


@pytest.mark.parametrize("which", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("how", ["auto", "none"])
def test_inputs_that_are_no_numbers_are_refused_with_where_they_are(which: str, how: str) -> None:
    made = Candidate.model_validate(
        {"data": {"factory": f"{HERE}:broken", "args": {"which": which}, "normalise": how}}
    )
    with pytest.raises(UserError, match=r"input 8 has NaN .*, 1 of 3, the first at 1; leave"):
        rehearse(made)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("auto", "Inputs, float32 (N, 4), are normalised (per feature) by the training split."),
        ("none", "Inputs, float32 (N, 4), are taken as they are (data.normalise)."),
        ({"mean": 0, "std": 2}, "Inputs, float32 (N, 4), are normalised by given constants."),
    ],
)
def test_how_inputs_are_normalised_is_said_once(
    how: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    _say_once.cache_clear()
    options = Candidate.model_validate({"data": {"factory": f"{HERE}:table", "normalise": how}})
    data = load_once(options.data, CPU)
    with caplog.at_level(logging.INFO, "slimfront.trainables.data"):
        check_data(data)
        check_data(data)
    assert caplog.messages == [words]


@pytest.mark.parametrize(
    "how", often(["auto", "global", "none", {"mean": [0, 0, 1, 5e4], "std": 10}], "auto")
)
def test_the_card_says_how_inputs_are_normalised_and_the_file_takes_them_raw(
    how: Any, tmp_path: Path
) -> None:
    made = Candidate.model_validate(
        {
            "data": {"factory": f"{HERE}:table", "normalise": how},
            "model": {"name": "mlp", "depth": 1, "width": 8},
            "training": {"epochs": 1},
            "one_shot": {"steps": 0},
        }
    )
    network = train(made).compacted.network
    data = load_once(made.data, CPU)
    shipment = ship(
        network, built(made.model, data), data, tmp_path / "n.pt2", "pt2", latency=Latency(runs=3)
    )
    said = card(shipment, "n", data, "table", {}, [])
    words = {"auto": "per feature", "global": "global"}
    if how == "none":
        assert "It takes inputs as they come, without normalisation." in said
    else:
        named = words[how] if isinstance(how, str) else "by given constants"
        assert f"Normalisation ({named}) is its first step." in said
    plain = load_once(
        Candidate.model_validate({"data": {**made.data.model_dump(), "normalise": "none"}}).data,
        CPU,
    )
    seen = network(data.prepare(data.test.inputs))
    assert torch.allclose(load(shipment.path)(plain.test.inputs), seen, rtol=1e-3, atol=1e-3)
