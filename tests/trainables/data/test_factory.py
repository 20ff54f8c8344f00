import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from slimfront import Candidate, train
from slimfront.trainables.data import Factory, load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several

MADE = "tests.trainables.data.made"


def test_tensors_are_split_as_the_digits_are() -> None:
    data = Factory(factory=f"{MADE}:image_tensors", args={"count": 90, "channels": 1}).load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [54, 18, 18]
    assert data.head == 3
    assert data.input_shape == (1, 8, 8)
    assert data.train.inputs.dtype == torch.uint8


def test_arrays_of_other_types_become_standardised_float32() -> None:
    inputs = Factory(factory=f"{MADE}:image_arrays").load().train.inputs
    assert inputs.dtype == torch.float32
    assert inputs.shape[1:] == (64,)
    assert inputs.mean(0).tolist() == pytest.approx([0] * 64, abs=1e-5)  # each feature by itself
    varied = inputs[:, inputs.std(0) > 0]
    assert varied.shape[1] > 50
    assert varied.std(0).tolist() == pytest.approx([1] * varied.shape[1], abs=1e-5)


@pytest.mark.parametrize("in_memory", [True, "auto"])
def test_whole_numbers_and_truths_stay_what_they_are(
    in_memory: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMFRONT_SESSION", "truths")
    options = Factory(factory=f"{MADE}:masked_ids", in_memory=in_memory)
    inputs = load_once(options, torch.device("cpu")).train.inputs
    assert isinstance(inputs, Several)
    assert [tensor.dtype for tensor in inputs.named.values()] == [torch.int64, torch.bool]
    assert torch.equal(inputs["ids"] > 0, inputs["mask"])


def test_a_data_set_is_taken_as_it_is_split() -> None:
    data = Factory(factory=f"{MADE}:ready_dataset").load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [10, 10, 10]
    # Its constants were worked out.
    assert float(data.prepare(data.train.inputs).mean()) == pytest.approx(0, abs=1e-5)


def test_a_candidate_trains_on_the_data_of_a_module_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    Path("my_own_data.py").write_text(
        "import torch\ndef load(n):\n    y = torch.arange(n) % 2\n    return torch.randn(n, 4) + 9 "
        "* y[:, None], y\n"
    )
    plain = {
        "data": {"name": "factory", "factory": "my_own_data:load", "args": {"n": 100}},
        "model": {"name": "mlp", "depth": 1, "width": 8},
        "training": {"epochs": 5, "lr": 0.01, "batch_size": 16},
    }
    assert train(Candidate.model_validate(plain)).measures["val_accuracy"] == 1


@pytest.mark.parametrize(
    ("factory", "args", "message"),
    [
        (
            f"{MADE}:a_list",
            {},
            "returned is of type list; right would be a slimfront.trainables.data.Dataset,",
        ),
        (f"{MADE}:four_tensors", {}, r"returned is a tuple of \(Tensor, Tensor, Tensor, Tensor\)"),
        (f"{MADE}:labels_with_a_gap", {}, "from -1 to 2, and no example of 0; number them without"),
        (f"{MADE}:unequal_lengths", {}, "has 3 inputs and 2 targets"),
        (f"{MADE}:targets_by_name", {}, "has targets by name, 'box', 'kind'; right would be one"),
        (f"{MADE}:broken", {}, "raised OSError: the disk is on fire"),
        (
            f"{MADE}:image_tensors",
            {"counts": 3},
            "raised TypeError: .*unexpected keyword argument 'counts'",
        ),
        (f"{MADE}:ready_dataset", {"dtype": "float64"}, "has inputs of float64 .* in 'train'"),
        (
            f"{MADE}:ready_dataset",
            {"largest_label": 3},
            "the data has targets from 0 to 3, and 3 classes; they are numbers in 0 … 2",
        ),
        (f"{MADE}:not_a_function", {}, "it is a int, and it must be a function or a class"),
        (
            f"{MADE}:image_tensor",
            {},
            "there is no 'image_tensor' in it; did you mean 'image_tensors'",
        ),
        ("nowhere.at.all:load", {}, "there is no module 'nowhere'"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said_in_one_sentence(
    factory: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Factory(factory=factory, args=args).load()
    assert "\n" not in str(caught.value)


def test_a_factory_cannot_change_its_options() -> None:
    options = Factory(factory=f"{MADE}:a_list", args={"x": [1]})
    assert options == options.model_copy(deep=True)
    with pytest.raises(ValidationError, match="frozen"):
        options.args = {}  # type: ignore[misc]


def test_options_that_differ_in_their_arguments_are_different_data() -> None:
    one, two = (
        Factory(factory=f"{MADE}:image_tensors", args={"count": count}) for count in (30, 60)
    )
    assert one != two
    same = Factory(factory=f"{MADE}:image_tensors", args={"count": 30})
    assert same == one and hash(same) == hash(one)
