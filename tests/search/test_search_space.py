"""Spaces whose values depend on each other: conditions, sections, values that are the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution

from slimfront.search.config.loading import load, load_recorded
from slimfront.search.config.paths import joined, parts
from slimfront.search.config.plain import dump
from slimfront.search.config.schema import Config
from slimfront.search.engine.proposals import Proposals
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG

GROWING: dict[str, Any] = {
    "sparsifier.name": {"choices": ["magnitude", "rigl", "set"]},
    "sparsifier.sparsity": {"low": 0.5, "high": 0.9},
    "sparsifier.drop": {"low": 0.1, "high": 0.5, "when": {"sparsifier.name": ["rigl", "set"]}},
}
SECTIONS: dict[str, Any] = {
    "sparsifier": {
        "choices": [
            {"name": "magnitude", "sparsity": 0.8},
            {"name": "rigl", "sparsity": 0.9},
            None,
        ]
    }
}
RIGL = "{name: rigl, sparsity: 0.9}"


def config_of(space: dict[str, Any], **changes: Any) -> Config:
    return Config.model_validate(SMALL_CONFIG | changes | {"space": space})


def proposals(config: Config) -> Proposals:
    return Proposals(config.search_space, config.distributions())


def refusal(tmp_path: Path, space: dict[str, Any], **changes: Any) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(SMALL_CONFIG | changes | {"space": space}))
    with pytest.raises(UserError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{file}: ")


def drawn(config: Config, wanted: dict[str, Any]) -> dict[str, Any]:
    """The values of a candidate for which these are chosen."""
    return config.search_space.values(lambda path: wanted[path])


def test_a_condition_decides_whether_a_value_is_there() -> None:
    config = config_of(GROWING)
    wanted = {"sparsifier.name": "magnitude", "sparsifier.sparsity": 0.7, "sparsifier.drop": 0.2}
    assert "sparsifier.drop" not in drawn(config, wanted)
    values = drawn(config, wanted | {"sparsifier.name": "set"})
    assert values["sparsifier.drop"] == 0.2
    sparsifier = config.candidate(values).sparsifier
    assert sparsifier is not None
    assert sparsifier.model_dump()["drop"] == 0.2


def test_a_condition_may_stand_before_what_it_is_over_and_itself_be_under_one() -> None:
    space = {
        "sparsifier.drop": {"low": 0.1, "high": 0.5, "when": {"sparsifier.name": "rigl"}},
        "sparsifier.name": {
            "choices": ["magnitude", "rigl"],
            "when": {"training.optimizer": "adam"},
        },
        "sparsifier.sparsity": {"low": 0.5, "high": 0.9},
        "training.optimizer": {"choices": ["adam", "sgd"]},
    }
    config = config_of(space)
    wanted = {
        "sparsifier.drop": 0.2,
        "sparsifier.name": "rigl",
        "sparsifier.sparsity": 0.5,
        "training.optimizer": "adam",
    }
    assert drawn(config, wanted) == wanted
    assert drawn(config, wanted | {"training.optimizer": "sgd"}) == {
        "sparsifier.sparsity": 0.5,
        "training.optimizer": "sgd",
    }


def test_whole_sections_are_chosen_and_known_by_their_text() -> None:
    config = config_of(SECTIONS, sparsifier={"name": "magnitude", "start": 0.1})
    (varies,) = config.distributions().values()
    assert isinstance(varies, CategoricalDistribution)
    assert RIGL in varies.choices
    sparsifier = config.candidate({"sparsifier": RIGL}).sparsifier
    assert sparsifier is not None
    assert (sparsifier.name, sparsifier.model_dump()["sparsity"]) == ("rigl", 0.9)
    assert config.candidate({"sparsifier": None}).sparsifier is None
    # What the config says of the first does not count against the second.
    assert sparsifier.model_dump()["start"] != 0.1


def test_lists_are_chosen_too() -> None:
    config = config_of({"training.freeze": {"choices": [[], ["0.*"]]}})
    (varies,) = config.distributions().values()
    assert isinstance(varies, CategoricalDistribution)
    frozen = [
        config.candidate({"training.freeze": text}).training.freeze for text in varies.choices
    ]
    assert frozen == [(), ("0.*",)]


def test_a_section_has_further_values_under_a_condition_on_it() -> None:
    space = SECTIONS | {
        "sparsifier.drop": {"low": 0.1, "high": 0.5, "when": {"sparsifier.name": "rigl"}}
    }
    config = config_of(space)
    values = drawn(config, {"sparsifier": RIGL, "sparsifier.drop": 0.25})
    sparsifier = config.candidate(values).sparsifier
    assert sparsifier is not None
    assert (sparsifier.name, sparsifier.model_dump()["drop"]) == ("rigl", 0.25)
    assert drawn(config, {"sparsifier": None, "sparsifier.drop": 0.25}) == {"sparsifier": None}


def test_the_model_varies_by_name_without_the_defaults_of_the_other() -> None:
    changes = {"model": "mlp", "data": "digits"}
    config = config_of({"model.name": {"choices": ["mlp", "lenet"]}}, **changes)
    assert config.candidate({"model.name": "lenet"}).model.name == "lenet"


def test_a_value_is_the_same_as_another_times_a_factor() -> None:
    space = {
        "penalties.layer.strength": {"low": 0.1, "high": 10, "log": True},
        "penalties.node.strength": {"same_as": "penalties.layer.strength", "factor": 0.5},
        'penalties.node.layers["0"]': {"same_as": "penalties.node.strength"},
    }
    config = config_of(space)
    assert list(config.distributions()) == ["penalties.layer.strength"]
    values = drawn(config, {"penalties.layer.strength": 4.0})
    assert values == {
        "penalties.layer.strength": 4.0,
        "penalties.node.strength": 2.0,
        "penalties.node.layers.0": 2.0,
    }
    node = config.candidate(values).penalties["node"].model_dump()
    assert (node["strength"], node["layers"]) == (2.0, {"0": 2.0})


def test_a_whole_number_stays_whole_under_a_factor() -> None:
    space = {
        "model.depth": {"low": 2, "high": 4},
        "model.width": {"same_as": "model.depth", "factor": 8},
    }
    values = drawn(config_of(space), {"model.depth": 3})
    assert values["model.width"] == 24
    assert isinstance(values["model.width"], int)


def test_layers_with_dots_in_their_names_have_strengths_of_their_own() -> None:
    path = 'penalties.node.layers["body.0"]'
    config = config_of(
        {path: {"low": 1, "high": 10}, "penalties.node.layers['fc']": {"same_as": path}}
    )
    assert config.distributions() == {path: FloatDistribution(1, 10)}
    assert list(config.space) == [path, "penalties.node.layers.fc"]
    layers = config.candidate({path: 3.0}).penalties["node"].model_dump()["layers"]
    assert layers == {"body.0": 3.0}


def test_a_path_with_dots_in_a_key_can_be_set(config_file: Path) -> None:
    path = 'penalties.node.layers["body.0"]'
    loaded = load(config_file, [f"{path}=2", f"space.{path}={{low: 1, high: 3}}"])
    assert loaded.penalties["node"].model_dump()["layers"] == {"body.0": 2.0}
    assert load(config_file, [f"space.{path}={{low: 1, high: 3}}"]).space[path].high == 3


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("a.b", ("a", "b")),
        ('a["b.c"]', ("a", "b.c")),
        ('a["b.c"].d', ("a", "b.c", "d")),
        ("""a['b"c']""", ("a", 'b"c')),
    ],
)
def test_paths_are_taken_apart_and_put_together(path: str, keys: tuple[str, ...]) -> None:
    assert parts(path) == keys
    assert joined(keys) == path


@pytest.mark.parametrize("path", ["", ".a", "a.", "a..b", 'a["b', "a[0]", 'a["b"]c', 'a.["b"]'])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(KeyError, match="is no path"):
        parts(path)


@pytest.mark.parametrize("space", [GROWING, SECTIONS])
def test_a_config_is_the_same_after_it_was_recorded(space: dict[str, Any]) -> None:
    config = config_of(space, tolerance=0.2, baseline="trained")
    again = load_recorded(dump(config))
    assert again == config
    assert again.distributions() == config.distributions()


LR = {"training.lr": {"low": 0.1, "high": 1}}
OPTIMIZER = {"training.optimizer": {"choices": ["adam", "sgd"]}}
BAD = [
    (
        LR | {"training.momentum": {"low": 0, "high": 0.9, "when": {"training.optimiser": "sgd"}}},
        "space 'training.momentum': has a 'when' over 'training.optimiser', which does not vary",
    ),
    (
        OPTIMIZER
        | {"training.momentum": {"low": 0, "high": 0.9, "when": {"training.optimizer": "sdg"}}},
        "space 'training.momentum': has a 'when' that can never hold: 'training.optimizer' is "
        "never 'sdg', only 'adam', 'sgd'",
    ),
    (
        OPTIMIZER
        | {"training.momentum": {"low": 0, "high": 0.9, "when": {"training.optimizer": []}}},
        "space 'training.momentum': can never vary: its 'when' lists no value",
    ),
    (
        LR | {"training.momentum": {"low": 0, "high": 0.9, "when": {"training.lr": 0.5}}},
        "has a 'when' over 'training.lr', which is a range without steps",
    ),
    (
        LR | {"training.momentum": {"low": 0, "high": 0.9, "when": {"training.lr": 5}}},
        "'training.lr' is never 5, only 0.1 to 1",
    ),
    (
        OPTIMIZER
        | {
            "training.batch_size": {"choices": [8, 16], "when": {"training.optimizer": "sgd"}},
            "training.momentum": {
                "low": 0,
                "high": 0.9,
                "when": {"training.optimizer": "adam", "training.batch_size": 8},
            },
        },
        "space 'training.momentum': can never vary: its 'when' and that of 'training.batch_size' "
        "need different values of 'training.optimizer'",
    ),
    (
        {"training.lr": {"same_as": "refit.lr"}, "refit.lr": {"same_as": "training.lr"}},
        "depends on itself, by 'same_as' or 'when': ",
    ),
    (
        {"training.lr": {"same_as": "training.lr"}},
        "depends on itself, by 'same_as' or 'when': training.lr -> training.lr",
    ),
    (
        LR | {"training.weight_decay": {"same_as": "training.rl"}},
        "space 'training.weight_decay': is the same as 'training.rl', which does not vary; did you "
        "mean 'training.lr'?",
    ),
    (LR | {"training.weight_dcay": {"same_as": "training.lr"}}, "unknown key 'weight_dcay'"),
    (
        LR | {"training.momentum": {"same_as": "training.lr"}},
        "space 'training.momentum': it should be less than 1, and it is 1",
    ),
    (
        OPTIMIZER | {"training.schedule": {"same_as": "training.optimizer", "factor": 2}},
        "space 'training.schedule': has a factor, and 'adam' is no number",
    ),
    ({"training.lr": {"low": 1, "high": 2, "same_as": "x"}}, "'same_as' does not go together with"),
    ({"training.lr": {"low": 1, "high": 2, "factor": 2}}, "'factor' goes together with 'same_as'"),
    (
        LR | {"training.weight_decay": {"same_as": "training.lr", "factor": 0}},
        "with factor: 0 it would always be 0",
    ),
    (
        LR
        | {
            "training.weight_decay": {"same_as": "training.lr"},
            "training.momentum": {"low": 0, "high": 0.9, "when": {"training.weight_decay": 1}},
        },
        "has a 'when' over 'training.weight_decay', which is the same as 'training.lr'; name that",
    ),
    (
        {"sparsifier": {"choices": [{"name": "rigl", "sparsty": 0.9}]}},
        "space 'sparsifier': unknown key 'sparsty'; did you mean 'sparsity'?",
    ),
    (
        # Magnitude has no such option, though the base of the config is not tried with it.
        GROWING
        | {
            "sparsifier.drop": {
                "low": 0.1,
                "high": 0.5,
                "when": {"sparsifier.name": ["rigl", "magnitude"]},
            }
        },
        "space 'sparsifier.drop': 'sparsifier': 'drop' is not an option of the sparsifier 'magni",
    ),
    ({'penalties.node.layers["body.0': {"low": 1, "high": 2}}, "is no path; keys are divided by"),
    (
        {
            "penalties.node.layers['0']": {"low": 1, "high": 2},
            "penalties.node.layers.0": {"low": 1, "high": 2},
        },
        "the path penalties.node.layers.0 stands twice",
    ),
]


@pytest.mark.parametrize(("space", "expected"), BAD)
def test_what_cannot_be_is_refused_in_one_sentence(
    tmp_path: Path, space: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(tmp_path, space)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (
            {"sparsifier.name": "magnitude", "sparsifier.drop": 0.2},
            "'sparsifier.drop' does not vary beside",
        ),
        ({"training.weight_decay": 0.2}, "'training.weight_decay' is the same as 'sparsifier"),
    ],
)
def test_starts_that_no_trial_can_have_are_refused(
    tmp_path: Path, start: dict[str, Any], expected: str
) -> None:
    space = GROWING | {"training.weight_decay": {"same_as": "sparsifier.sparsity"}}
    search = {"start_from": [start]}
    assert f"search.start_from[0]: {expected}" in refusal(tmp_path, space, search=search)


def test_every_value_is_rehearsed_where_it_applies() -> None:
    names = {one.sparsifier.name for one in config_of(GROWING).rehearsed() if one.sparsifier}
    assert names == {"magnitude", "rigl", "set"}
    sections = config_of(SECTIONS).rehearsed()
    assert {one.sparsifier and one.sparsifier.name for one in sections} == {
        "magnitude",
        "rigl",
        None,
    }


def test_all_candidates_of_a_space_without_ranges_are_counted() -> None:
    space = SECTIONS | {
        "sparsifier.drop": {
            "low": 0.1,
            "high": 0.5,
            "step": 0.2,
            "when": {"sparsifier.name": "rigl"},
        },
        "model.depth": {"low": 1, "high": 3},
        "model.width": {"same_as": "model.depth", "factor": 8},
    }
    assert proposals(config_of(space)).size == (2 + 3) * 3
    assert proposals(config_of(GROWING)).left is None
    assert proposals(config_of({"training.batch_size": {"low": 1, "high": 10**6}})).left is None


def test_what_is_rehearsed_of_a_sparsifier_has_values_of_the_space_alone() -> None:
    space = {
        "sparsifier.name": {"choices": ["magnitude", "rigl"]},
        "sparsifier.sparsity": {"low": 0.2, "high": 0.9},
        "sparsifier.every": {"low": 2, "high": 4, "when": {"sparsifier.name": "rigl"}},
    }
    tried = [one.sparsifier for one in config_of(space).rehearsed()]
    assert {one.every for one in tried if one is not None and one.name == "rigl"} == {2, 4}
