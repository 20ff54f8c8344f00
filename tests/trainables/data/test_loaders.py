"""Data sets and loaders of torch, which are read once."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from slimfront import Candidate, train
from slimfront.trainables.data import Factory
from slimfront.trainables.data.loaders import is_torch_data, read_all
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several
from slimfront.trainables.tasks import TokenClassification

HERE = "tests.trainables.data.test_loaders"


def rows(count: int = 60) -> TensorDataset:
    x = torch.arange(count * 3, dtype=torch.float32).reshape(count, 3)
    return TensorDataset(x, torch.arange(count) % 2)


class Items(Dataset[Any]):
    """Example n as `make` has it."""

    def __init__(self, make: Any, count: int = 10) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> Any:
        return self.make(n)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((torch.tensor([float(n), 1.0]), n % 2) for n in range(30))


def as_dataset() -> Any:
    return rows()


def as_loader() -> Any:
    return DataLoader(rows(), batch_size=7, shuffle=True)


def as_stream() -> Any:
    return Stream()


def as_splits() -> dict[str, Any]:
    first, second = random_split(rows(), [40, 20], torch.Generator().manual_seed(0))
    return {"train": DataLoader(first, batch_size=16), "test": second}


def test_what_is_of_torch_is_known() -> None:
    assert is_torch_data(rows()) and is_torch_data(DataLoader(rows())) and is_torch_data(Stream())
    assert not is_torch_data((torch.zeros(2), torch.zeros(2)))


@pytest.mark.parametrize("factory", ["as_dataset", "as_loader", "as_stream", "as_splits"])
def test_a_candidate_trains_on_data_sets_and_loaders_of_torch(factory: str) -> None:
    plain = {
        "data": {"factory": f"{HERE}:{factory}"},
        "model": {"name": "mlp", "depth": 1, "width": 4},
        "training": {"epochs": 1},
        "one_shot": {"steps": 0},
    }
    assert 0 <= train(Candidate.model_validate(plain)).measures["val_accuracy"] <= 1


def test_every_example_is_read_once_in_the_order_of_the_data_set() -> None:
    x, y = read_all(rows(600), "it")
    assert torch.equal(x, rows(600).tensors[0]) and torch.equal(y, rows(600).tensors[1])


def test_a_loader_that_shuffles_gives_every_process_the_same_order() -> None:
    torch.manual_seed(1)
    first, _ = read_all(as_loader(), "it", seed=3)
    torch.manual_seed(2)
    again, _ = read_all(as_loader(), "it", seed=3)
    other, _ = read_all(as_loader(), "it", seed=4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort(0).values, rows().tensors[0])


def test_reading_leaves_the_random_numbers_of_the_process_alone() -> None:
    def draw(n: int) -> tuple[Tensor, int]:
        return torch.rand(2) + random.random() + np.random.rand(), n % 2

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, _ = read_all(Items(draw), "it")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(first, read_all(Items(draw), "it")[0])


def test_random_transforms_are_warned_of_even_where_they_act_half_of_the_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def flipped(n: int) -> tuple[Tensor, int]:
        x = torch.arange(4.0) + n
        return (x.flip(0) if random.random() < 0.5 else x), n % 2

    read_all(Items(flipped), "it")
    assert ["draws its examples at random" in message for message in caplog.messages] == [True]
    caplog.clear()
    read_all(rows(), "it")
    assert not caplog.messages


def test_examples_that_a_loader_leaves_out_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    x, _ = read_all(DataLoader(rows(10), batch_size=4, drop_last=True), "it")
    assert len(x) == 8
    assert "it leaves out the last examples of an epoch (drop_last)" in caplog.messages


def test_names_of_targets_and_several_inputs_come_through() -> None:
    x, y = read_all(Items(lambda n: (torch.ones(2), "ab"[n % 2])), "it")
    assert y == ["a", "b"] * 5 and x.shape == (10, 2)
    x, y = read_all(
        Items(lambda n: {"ids": torch.ones(3), "mask": torch.ones(3), "labels": n}), "it"
    )
    assert list(x) == ["ids", "mask"] and y.tolist() == list(range(10))
    x, y = read_all(Items(lambda n: (torch.ones(2), torch.zeros(3), n)), "it")
    assert [part.shape[1] for part in x] == [2, 3]
    x, _ = read_all(Items(lambda n: ((torch.ones(2), torch.zeros(3)), n)), "it")
    assert [part.shape[1] for part in x] == [2, 3]


def _padded(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*batch, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(x), batch_first=True), pad(list(y), batch_first=True, padding_value=-100)


def ragged() -> Any:
    items = Items(lambda n: (torch.arange(1, 3 + n), torch.arange(2 + n) % 2), 10)
    return DataLoader(items, batch_size=2, collate_fn=_padded)


def test_batches_of_different_lengths_are_padded_so_that_padding_does_not_count() -> None:
    x, y = read_all(ragged(), "it", ignore=-100)
    assert x.shape == y.shape == (10, 11)
    assert x[0].tolist() == [1, 2] + [0] * 9
    assert y[0].tolist() == [0, 1] + [-100] * 9
    data = Factory(factory=f"{HERE}:ragged", division="random").load(TokenClassification())
    assert int((data.train.targets == -100).sum()) > 0
    with pytest.raises(UserError, match="targets of different shapes, which this task cannot pad"):
        read_all(ragged(), "it")


def _raises(n: int) -> Any:
    raise KeyError("no such file")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Items(lambda n: torch.ones(2)), "it gives a Tensor; each example is"),
        (Items(lambda n: {"x": torch.ones(2), "y": 1}), "mappings with x, y; one key is to be"),
        (Items(_raises), "it raised KeyError: 'no such file'"),
        (Items(lambda n: (torch.ones(2), 1), 0), "it has no examples"),
        (Items(lambda n: (torch.ones(2), None)), "it raised TypeError"),
        (Items(lambda n: ("text", 1)), "it raised"),
        (Items(lambda n: (torch.ones(n + 1), 1)), "collate_fn pads each batch"),
        (
            DataLoader(
                Items(lambda n: n, 2),
                batch_size=1,
                collate_fn=lambda b: (torch.ones([1] * (b[0] + 2)), torch.zeros(1)),
            ),
            "different numbers of axes",
        ),
    ],
)
def test_what_is_no_data_is_refused_in_one_sentence(made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_all(made, "it")
    assert "\n" not in str(caught.value)


def test_several_inputs_of_a_data_set_are_taken_by_name() -> None:
    data = Factory(factory=f"{HERE}:named").load()
    assert isinstance(data.train.inputs, Several)
    assert list(data.train.inputs.named) == ["a", "b"]


def named() -> Any:
    return Items(lambda n: {"a": torch.ones(2), "b": torch.tensor(n), "label": n % 2}, 40)
