"""What targets may look like when they come, and what each task makes of them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from slimfront import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks import (
    Classification,
    MultiLabel,
    Regression,
    Segmentation,
    SequenceClassification,
    Task,
    TokenClassification,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("given", "targets", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        (np.array(["b", "a", "b"]), [1, 0, 1], ("a", "b")),
        (np.array([["b"], ["a"], ["c"]], dtype=object), [1, 0, 2], ("a", "b", "c")),
        (pd.Series(["no", "yes", "no"]), [0, 1, 0], ("no", "yes")),
        (pd.Series([0, 2, 1]), [0, 2, 1], ()),
        ([True, False, True], [1, 0, 1], ()),
        (torch.tensor([True, False]), [1, 0], ()),
        ([1, 2, 3, 1], [0, 1, 2, 0], ("1", "2", "3")),
        ([-1, 1, -1], [0, 1, 0], ("-1", "1")),
        (torch.tensor([3.0, 7.0, 3.0]), [0, 1, 0], ("3", "7")),
        (np.array([0.0, 1.0, 2.0]), [0, 1, 2], ()),
        (np.array([[0], [2], [1]]), [0, 2, 1], ()),
        (np.array([0, 1, 2], dtype=np.uint16), [0, 1, 2], ()),
        (np.array([0, 1, 2], dtype=np.int8), [0, 1, 2], ()),
        (torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]]), [1, 0, 2], ()),
        (np.array([[True, False], [False, True]]), [0, 1], ()),
    ],
)
@pytest.mark.parametrize("task", [Classification(), SequenceClassification()])
def test_what_plainly_names_a_class_becomes_a_number_from_0_and_the_mapping_is_kept(
    given: Any, targets: list[int], names: tuple[str, ...], task: Task
) -> None:
    found = task.encode(given)
    assert found.targets.tolist() == targets
    assert found.targets.dtype == torch.int64
    assert found.names == names
    assert found.outputs == (len(names) or max(targets) + 1)


def test_how_many_classes_there_are_may_be_said_and_names_may_come_with_the_data() -> None:
    assert Classification(classes=5).encode([0, 3, 1]).outputs == 5
    named = Classification().encode([0, 2, 0], ["low", "mid", "high"])
    assert (named.outputs, named.names) == (3, ("low", "mid", "high"))


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (Classification(), [0, 1, 3], "classes from 0 to 3, and no example of 2; number them"),
        (Classification(), [2, 2, 2], "all examples have one and the same class"),
        (Classification(), ["a", "a"], "all examples have one and the same class"),
        (Classification(classes=3), [1, 1, 1], "all examples have one and the same class"),
        (Classification(), [0.0, 1.5, 1.0], "the target of example 1 is 1.5; the task classif"),
        (Classification(), [0.0, NAN], "the target of example 1 is NaN or infinite"),
        (Classification(), ["a", None, "b"], "the target of example 1 is None, and others are n"),
        (Classification(), ["a", 3, "b"], "the target of example 1 is 3, and others are names"),
        (Classification(), [1, None], "the target of example 1 is missing"),
        (Classification(), np.array([1, "x"], dtype=object), "example 0 is 1, and others are nam"),
        (Classification(), [], "there are no targets"),
        (Classification(), torch.zeros(4, 3), r"shape \(4, 3\) .* set task: multilabel"),
        (Classification(), torch.ones(4, 2, dtype=torch.cfloat), "type torch.complex64"),
        (Classification(classes=2), [0, 1, 2], r"targets from 0 to 2, and 2 classes; they are n"),
        (Classification(classes=4), ["a", "b"], r"task.classes is 4, and the data has 2 \(a, b\)"),
        (MultiLabel(), [0, 1], r"shape \(2,\); the task multilabel takes a 0 or 1 for each class"),
        (MultiLabel(), [[0, 1], [2, 1]], "example 1 has 2 at class 0; the task multilabel takes"),
        (MultiLabel(), [[0.0, 1], [NAN, 1]], "the target of example 1 is NaN"),
        (MultiLabel(), ["a", "b"], "the target of example 0 is 'a', and the task multilabel"),
        (Regression(), ["1.5", "2"], "the target of example 0 is '1.5', and the task regression"),
        (Regression(), [1.5, None], "the target of example 1 is missing"),
        (Regression(), [1.5, float("inf")], "the target of example 1 is NaN or infinite"),
        (Regression(), np.array([1.0, 1e300]), "example 1 is larger than float32 can hold"),
        (Regression(), [4.0, 4.0], "all examples have one and the same target, 4"),
        (Regression(), torch.zeros(2, 3, 4), r"shape \(2, 3, 4\)"),
        (Segmentation(), torch.full((2, 4, 4), 0.5), "takes a whole number for each place"),
        (Segmentation(), torch.zeros(3, dtype=torch.int64), r"\(N, height, width\)"),
        (Segmentation(), torch.zeros(2, 4, 4).long(), "one and the same class"),
        (Segmentation(ignore=0), torch.zeros(2, 4, 4).long(), "no place of any example counts"),
        (
            Segmentation(classes=2),
            torch.tensor([[[0, 1], [1, 255]]]),
            "classes from 0 to 255, and the task segmentation takes 0 … 1; set task.ignore",
        ),
        (TokenClassification(), torch.zeros(3).long(), r"for each place, \(N, length\)"),
        (TokenClassification(), torch.tensor([[0, 1, -1, 2]]), "classes from -1 to 2"),
    ],
)
def test_targets_of_no_plain_meaning_are_refused_with_which_and_where(
    task: Task, given: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        task.encode(given)
    assert "\n" not in str(caught.value)


def test_multilabel_targets_may_be_booleans_or_minus_one_and_one() -> None:
    for given in ([[True, False], [False, True]], [[1, -1], [-1, 1]], [[1.0, 0], [0, 1]]):
        assert MultiLabel().encode(given).targets.tolist() == [[1, 0], [0, 1]]


def test_a_column_of_numbers_is_a_number_for_each_example() -> None:
    found = Regression().encode(pd.DataFrame({"y": [1, 2]}))
    assert (found.targets.tolist(), found.outputs) == ([1.0, 2.0], 1)
    assert Regression().encode([[1, 2, 3], [2, 3, 4]]).outputs == 3


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (torch.tensor([[[0.0, 1], [1, 0]]]), ()),
        (torch.tensor([[[False, True], [True, False]]]), ()),
        (torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8), ("0", "255")),
        (torch.tensor([[[[0, 1], [1, 0]]]]), ()),
        (torch.tensor([[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]]), ()),
    ],
)
def test_masks_are_read_as_they_usually_come(given: torch.Tensor, names: tuple[str, ...]) -> None:
    found = Segmentation().encode(given)
    assert found.targets.tolist() == [[[0, 1], [1, 0]]]
    assert (found.outputs, found.names) == (2, names)


def test_places_that_do_not_count_stay_apart_when_two_values_are_mapped() -> None:
    found = TokenClassification().encode(torch.tensor([[1, 2, -100]]))
    assert found.targets.tolist() == [[0, 1, -100]]
    assert found.names == ("1", "2")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "classification", "metrics": ["accuracy", "accuracy"]}, "two metrics are called"),
        (
            {"metrics": ["f1", {"name": "accuracy", "called": "f1"}], "name": "classification"},
            "two metrics are called 'f1'; give one another name by 'called'",
        ),
        ({"name": "regression", "metrics": "r3"}, "unknown metric 'r3'; known: explained_variance"),
        ({"name": "regression", "loss": "mea"}, "unknown loss 'mea', and .*; did you mean 'mse'"),
        ({"name": "regresion"}, "unknown task 'regresion'; did you mean 'regression'"),
        ({"name": "regression", "class_weights": "balanced"}, "'class_weights' is not an option"),
        ({"name": "classification", "metrics": {"factory": "a:b"}}, "say whether larger or small"),
        ({"name": "classification", "metrics": {"factory": "ab", "better": "larger"}}, "form pack"),
    ],
)
def test_a_task_that_is_wrong_in_itself_is_refused_with_what_would_be_right(
    task: Any, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Candidate.model_validate({"task": task})
