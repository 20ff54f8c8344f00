from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slimfront import Candidate
from slimfront.trainables.data import (
    Augment,
    Data,
    Dataset,
    Digits,
    Factory,
    Split,
    load_once,
    split,
)
from slimfront.trainables.data.base import CLASSIFICATION
from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks import Regression, Task
from tests.trainables.data.made import image_tensors

CPU = torch.device("cpu")
IMAGES = Factory(factory="tests.trainables.data.made:image_tensors")


def test_a_process_loads_a_data_set_once() -> None:
    assert load_once(Digits(), CPU) is load_once(Digits(), CPU)
    assert load_once(Digits(), CPU) is not load_once(Digits(seed=1), CPU)


def test_augmentation_shares_the_tensors_of_the_data_set_without_it() -> None:
    plain = load_once(IMAGES, CPU)
    varied = load_once(IMAGES.model_copy(update={"augment": Augment(crop=2, flip=True)}), CPU)
    assert varied.train.inputs is plain.train.inputs
    assert varied.augment.crop == 2 and not plain.augment.active


def test_images_stay_uint8_in_memory_and_networks_see_normalised_float32() -> None:
    data = IMAGES.load()
    for part in (data.train, data.validation, data.test):
        assert part.inputs.dtype == torch.uint8
        assert part.targets.dtype == torch.int64
    seen = data.prepare(data.train.inputs)
    assert seen.dtype == torch.float32
    assert seen.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert seen.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_preparing_leaves_the_stored_inputs_as_they_are() -> None:
    for data in (IMAGES.load(), Digits().load()):
        before = data.train.inputs.clone()
        data.prepare(data.train.inputs)
        assert torch.equal(data.train.inputs, before)


def test_without_augmentation_the_generator_is_not_used() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    data = IMAGES.load()
    assert torch.equal(
        data.augmented(data.train.inputs, generator), data.prepare(data.train.inputs)
    )
    assert torch.equal(generator.get_state(), before)


def test_augmented_inputs_are_normalised_float32_and_differ_from_the_stored_ones() -> None:
    data = load_once(IMAGES.model_copy(update={"augment": Augment(crop=2, flip=True)}), CPU)
    varied = data.augmented(data.train.inputs, torch.Generator().manual_seed(0))
    assert varied.dtype == torch.float32
    assert varied.shape == data.train.inputs.shape
    assert not torch.equal(varied, data.prepare(data.train.inputs))


def test_augmentation_of_what_is_not_an_image_is_refused() -> None:
    rows = Factory(factory="tests.trainables.data.made:image_arrays", augment=Augment(flip=True))
    with pytest.raises(UserError, match=r"data.augment needs images .* have the shape \(64,\)"):
        load_once(rows, CPU)


def test_every_data_set_can_be_augmented_by_its_config() -> None:
    made = Candidate.model_validate(
        {"data": {"name": "digits", "augment": {"crop": 1, "flip": False}}}
    )
    assert made.data.augment == Augment(crop=1)
    assert load_once(made.data, CPU).augment.crop == 1
    with pytest.raises(ValidationError, match="unknown key 'crops'"):
        Candidate.model_validate({"data": {"name": "digits", "augment": {"crops": 1}}})


def test_constant_inputs_are_normalised_to_zeros_instead_of_nan() -> None:
    labels = torch.arange(30) % 3
    for inputs in (torch.full((30, 1, 4, 4), 9, dtype=torch.uint8), torch.ones(30, 5)):
        data = split(Digits(), CLASSIFICATION, inputs, labels)
        assert data.prepare(data.train.inputs).count_nonzero() == 0


def test_too_few_examples_of_a_class_are_refused_with_a_sentence() -> None:
    inputs, labels = image_tensors(9)
    with pytest.raises(UserError, match=r"hold out .*: class 1 has 1 example; two are needed"):
        split(Digits(), CLASSIFICATION, inputs, labels)


def test_a_split_without_training_examples_is_refused() -> None:
    with pytest.raises(ValidationError, match="leave no training examples"):
        Digits(validation=0.5, test=0.5)


def test_options_of_every_data_set_are_hashable_and_come_back_from_plain_data(
    tmp_path: Path,
) -> None:
    every: list[dict[str, object]] = [
        {"name": "digits", "augment": {"crop": 2, "flip": True}},
        {"name": "huggingface", "path": str(tmp_path), "limit": 5},
        {"name": "huggingface", "data_files": {"train": "a.parquet"}},
        {"name": "factory", "factory": "a:b", "args": {"x": [1, {"y": None}]}},
    ]
    for plain in every:
        first, second = (Candidate.model_validate({"data": plain}).data for _ in range(2))
        assert isinstance(first, Data) and first == second and hash(first) == hash(second)
        assert Candidate.model_validate({"data": first.model_dump(mode="json")}).data == first


def test_a_data_set_can_be_just_a_name() -> None:
    assert Candidate.model_validate({"data": "digits"}).data == Digits()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("fits", [True, False])
def test_data_that_does_not_fit_a_gpu_stays_outside_and_networks_see_the_same(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(IMAGES.load(), augment=Augment(crop=2, flip=True))
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    there = here.to(torch.device("cuda"))
    assert there.train.inputs.is_cuda == there.test.targets.is_cuda == fits
    wanted = here.augmented(here.train.inputs, torch.Generator().manual_seed(0))
    found = there.augmented(there.train.inputs, torch.Generator().manual_seed(0))
    assert found.is_cuda
    assert torch.allclose(found.cpu(), wanted, atol=1e-6)


def test_preparing_does_not_change_what_is_stored() -> None:
    split = Split(torch.full((4, 2), 5.0), torch.zeros(4, dtype=torch.int64))
    data = Dataset(split, split, split, outputs=1, mean=torch.tensor(3.0), std=torch.tensor(2.0))
    assert torch.equal(data.prepare(split.inputs), torch.ones(4, 2))
    assert torch.equal(split.inputs, torch.full((4, 2), 5.0))


def numbered(count: int = 60, groups: bool = False, kinds: int = 3) -> Any:
    """Example n has n as its input; groups of five in a row."""
    x = torch.arange(float(count)).unsqueeze(1)
    y = torch.arange(count) % kinds
    return (x, y, [f"person {n // 5}" for n in range(count)]) if groups else (x, y)


def divided(task: Task = CLASSIFICATION, **options: Any) -> list[list[int]]:
    """The numbers of the examples in each split."""
    args = {key: options.pop(key) for key in ("count", "groups", "kinds") if key in options}
    factory = f"tests.trainables.data.test_base:{options.pop('made', 'numbered')}"
    data = Factory(factory=factory, args=args, normalise="none", **options).load(task)
    splits = (data.train, data.validation, data.test)
    return [sorted(split.inputs[:, 0].int().tolist()) for split in splits]


@pytest.mark.parametrize("division", ["auto", "random", "stratified", "order"])
def test_every_example_is_in_one_split(division: str) -> None:
    splits = divided(division=division)
    assert sorted(chain(*splits)) == list(range(60))
    assert [len(split) for split in splits] == [36, 12, 12]


def test_by_order_the_last_examples_are_the_test_set() -> None:
    assert divided(division="order") == [list(range(36)), list(range(36, 48)), list(range(48, 60))]


def test_stratified_splits_have_equal_shares_and_are_what_a_task_with_kinds_gets() -> None:
    for division in ("auto", "stratified"):
        for part in divided(division=division):
            shares = [sum(n % 3 == kind for n in part) for kind in range(3)]
            assert len(set(shares)) == 1
    assert divided(division="auto") == divided(division="stratified")
    assert divided(division="random") != divided(division="stratified")
    assert divided(division="random", seed=1) != divided(division="random")


@pytest.mark.parametrize("division", ["auto", "groups"])
def test_examples_of_one_group_are_in_one_split(division: str) -> None:
    splits = divided(division=division, groups=True)
    people = [{n // 5 for n in split} for split in splits]
    assert sorted(chain(*splits)) == list(range(60))
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert all(people)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (CLASSIFICATION, {"division": "groups"}, "division is groups, and the data has none; its"),
        (
            Regression(),
            {"division": "stratified"},
            "the task regression has no kinds of targets whose shares could be equal; set it to ra",
        ),
        (CLASSIFICATION, {"groups": True, "count": 9}, "too few groups to hold out a share of"),
        (CLASSIFICATION, {"division": "order", "count": 2}, "none of 1 is left when 1 are held"),
        (CLASSIFICATION, {"count": 61, "kinds": 60}, "class 1 has 1 example; "),
        (CLASSIFICATION, {"made": "one_rare"}, "class 'rare' has 1 example; "),
        (
            CLASSIFICATION,
            {"made": "own_splits", "division": "groups"},
            "the data has splits of its own and no groups",
        ),
    ],
)
def test_a_division_that_cannot_be_is_refused(
    task: Task, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        divided(task, **options)
    assert "\n" not in str(caught.value)


def one_rare() -> Any:
    return torch.arange(30.0).unsqueeze(1), ["rare", *(["often", "usual"] * 15)[:29]]


def own_splits(left_out: str = "validation") -> Any:
    x, y = numbered()
    made = {"train": (x[:40], y[:40]), "validation": (x[40:50], y[40:50]), "test": (x[50:], y[50:])}
    del made[left_out]
    return made


def test_splits_of_the_users_own_stay_and_what_is_left_out_is_held_out_of_training() -> None:
    train, validation, test = divided(made="own_splits")
    assert test == list(range(50, 60))
    assert len(validation) == 8 and sorted(train + validation) == list(range(40))
    last = Factory(
        factory="tests.trainables.data.test_base:own_splits",
        args={"left_out": "test"},
        normalise="none",
        division="order",
    ).load()
    assert last.validation.inputs[:, 0].tolist() == list(range(40, 50))
    assert last.test.inputs[:, 0].tolist() == list(range(32, 40))
