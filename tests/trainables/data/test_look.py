"""The data are looked at before anything else."""

import dataclasses
import io
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from slimfront.trainables.data import Dataset, Digits, HuggingFace, Split
from slimfront.trainables.data.look import check_data
from slimfront.trainables.errors import UserError
from tests.trainables.data import made


def changed(name: str, *, value: float | None = None, label: int | None = None) -> Dataset:
    data = Digits().load()
    split: Split = getattr(data, name)
    inputs, labels = split.inputs.clone(), split.targets.clone()
    if value is not None:
        inputs[5].flatten()[7] = value
    if label is not None:
        labels[labels == label] = (label + 1) % 10
    return dataclasses.replace(data, **{name: Split(inputs, labels)})


@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_its_place(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"input 5 of {name} has NaN or infinite numbers, 1 of 64"):
        check_data(changed(name, value=value))


def test_a_class_that_training_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_data(Digits().load())
        assert not caplog.records
        check_data(changed("train", label=3))
    assert [record.getMessage().partition(" split")[0] for record in caplog.records] == [
        "the validation",
        "the test",
    ]
    assert "(3)" in caplog.text


@pytest.mark.parametrize(("mode", "alpha"), [("RGBA", 0), ("RGBA", 255), ("RGB", None)])
def test_images_that_lose_their_alpha_are_said_and_opaque_ones_are_not(
    mode: str, alpha: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = made.pictures(30, 3)
    encoded = []
    for pixels in images:
        image = Image.fromarray(pixels).convert(mode)
        if alpha is not None:
            image.putalpha(alpha)
        image.save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    made.write_parquet(tmp_path / "train.parquet", encoded, labels)
    with caplog.at_level(logging.WARNING):
        HuggingFace(path=str(tmp_path)).load()
    assert ("whose alpha is left out" in caplog.text) is (alpha == 0)


def test_whole_numbers_are_always_finite() -> None:
    data = Digits().load()
    images = Split(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
    check_data(dataclasses.replace(data, train=images, validation=images, test=images))
