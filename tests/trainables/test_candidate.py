import pytest
from pydantic import ValidationError

from trainables import Candidate


def test_a_candidate_goes_through_plain_data_unchanged(candidate: Candidate) -> None:
    assert Candidate.model_validate(candidate.model_dump(mode="json")) == candidate


def test_the_dense_candidate_keeps_data_model_and_training_only(candidate: Candidate) -> None:
    dense = candidate.dense()
    assert (dense.data, dense.model, dense.training) == (candidate.data, candidate.model, candidate.training)
    assert not dense.penalties
    assert dense.sparsifier is None
    assert not dense.compaction.enabled


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0])
def test_sparsity_must_be_in_zero_to_one(sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        Candidate.model_validate({"sparsifier": {"name": "magnitude", "sparsity": sparsity}})
