import pytest
import torch

from slimfront.trainables.data import Digits


def test_digits_are_split_into_three_disjoint_parts_of_all_1797_images() -> None:
    data = Digits().load()
    sizes = [len(split.targets) for split in (data.train, data.validation, data.test)]
    assert sum(sizes) == 1797
    assert sizes[1:] == [360, 360] or sizes[1:] == [359, 360]
    rows = torch.cat([split.inputs for split in (data.train, data.validation, data.test)]).flatten(
        1
    )
    # Every digit image is unlike every other, so none is in two splits.
    assert len(rows.unique(dim=0)) == 1797


def test_the_split_depends_on_its_seed_only() -> None:
    first, again, other = Digits(seed=0).load(), Digits(seed=0).load(), Digits(seed=1).load()
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert not torch.equal(first.train.targets, other.train.targets)


def test_every_split_has_all_classes_in_equal_shares() -> None:
    data = Digits().load()
    for split in (data.train, data.validation, data.test):
        shares = split.targets.bincount(minlength=10) / len(split.targets)
        assert float(shares.max() - shares.min()) < 0.03


def test_inputs_are_standardised_by_the_training_split() -> None:
    train = Digits().load().train.inputs
    assert float(train.mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.std()) == pytest.approx(1, abs=1e-5)
    assert train.shape[1:] == (1, 8, 8)
    assert train.dtype == torch.float32
