from typing import Literal

import pytest
from pydantic import Field, ValidationError

from slimfront.trainables.options import Options, Registry, suggest


class Shape(Options):
    name: str
    size: int = Field(1, ge=0)


@pytest.fixture
def shapes() -> Registry[Shape]:
    registry: Registry[Shape] = Registry("shape")
    registry.register("square")(Shape)
    return registry


def test_a_near_word_is_suggested_and_otherwise_all_choices_are_listed() -> None:
    assert suggest("epoch", ["epochs", "lr"]) == "did you mean 'epochs'?"
    assert suggest("xyz", ["lr", "epochs"]) == "known: epochs, lr"


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValidationError, match=r"unknown key 'siez'; did you mean 'size'\?"):
        Shape.model_validate({"name": "square", "siez": 3})


def test_options_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Shape(name="square").size = 3  # type: ignore[misc]


def test_infinite_and_nan_values_are_refused() -> None:
    class Real(Options):
        value: float

    for value in (float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="finite"):
            Real(value=value)


def test_truth_is_no_number() -> None:
    class Mixed(Options):
        epochs: int = 1
        rate: float | None = None
        every: int | Literal["auto"] = "auto"
        on: bool = False
        either: bool | int = 3
        switch: Literal["auto", True, False] | int = "auto"

    for key in ("epochs", "rate", "every"):
        with pytest.raises(ValidationError, match="it should be a number, and it is true") as told:
            Mixed.model_validate({key: True})
        assert told.value.errors()[0]["loc"] == (key,)
    made = Mixed.model_validate({"on": True, "either": True, "switch": True, "every": 2})
    assert (made.on, made.either, made.switch, made.every) == (True, True, True, 2)


def test_a_registry_refuses_a_name_twice(shapes: Registry[Shape]) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        shapes.register("square")(Shape)


def test_a_bare_name_stands_for_its_defaults(shapes: Registry[Shape]) -> None:
    assert shapes.parse_named("square") == Shape(name="square", size=1)


def test_a_problem_inside_a_mapping_of_options_keeps_its_place(shapes: Registry[Shape]) -> None:
    with pytest.raises(ValidationError) as caught:
        shapes.parse_mapping({"square": {"name": "square", "size": -1}})
    assert caught.value.errors()[0]["loc"] == ("square", "size")
