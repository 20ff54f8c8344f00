from typing import Any

import pytest
from pydantic import ValidationError

from slimfront import Candidate, train


def test_a_candidate_goes_through_plain_data_unchanged(candidate: Candidate) -> None:
    assert Candidate.model_validate(candidate.model_dump(mode="json")) == candidate


def test_the_dense_candidate_keeps_data_model_and_training_only(candidate: Candidate) -> None:
    dense = candidate.dense()
    assert (dense.data, dense.model, dense.training) == (
        candidate.data,
        candidate.model,
        candidate.training,
    )
    assert not dense.penalties
    assert dense.sparsifier is None
    assert not dense.compaction.enabled


def test_the_dense_candidate_is_trained_for_as_many_epochs_as_what_it_is_compared_with() -> None:
    own = Candidate.model_validate({"training": {"epochs": 2}, "refit": {"epochs": 3, "lr": 0.01}})
    assert own.dense().refit == own.refit
    trained = train(own.dense())
    assert [epoch["epoch"] for epoch in trained.history] == [1, 2, 3, 4, 5]
    assert trained.compacted.report.steps == ()
    given = own.dense(trained=False)
    assert (given.training.epochs, given.refit.epochs) == (0, 0)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0])
def test_sparsity_must_be_in_zero_to_one(sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        Candidate.model_validate({"sparsifier": {"name": "magnitude", "sparsity": sparsity}})


@pytest.mark.parametrize("name", ["rigl", "set", "granet", "lottery"])
def test_what_chooses_while_training_is_refused_without_training(name: str) -> None:
    tree = {"sparsifier": {"name": name, "sparsity": 0.5}, "training": {"epochs": 0}}
    with pytest.raises(ValidationError, match=f"'{name}' acts while training"):
        Candidate.model_validate(tree)
    tree["sparsifier"] = {"name": "magnitude", "sparsity": 0.5}
    Candidate.model_validate(tree)


@pytest.mark.parametrize(("penalty", "least"), [("cka", 4), ("aug_cka", 2)])
def test_a_batch_too_small_for_a_penalty_is_refused(penalty: str, least: int) -> None:
    tree: dict[str, Any] = {
        "penalties": {penalty: {"strength": 1.0}},
        "training": {"batch_size": least},
    }
    Candidate.model_validate(tree)
    tree["training"]["batch_size"] -= 1
    with pytest.raises(
        ValueError,
        match=(
            rf"penalties\.{penalty} looks at {least} samples of a batch or more; set "
            r"training\.batch_size"
        ),
    ):
        Candidate.model_validate(tree)
