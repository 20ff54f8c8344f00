"""What varies must be able to change something, and must not be luck."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from slimfront.search.config.loading import load
from slimfront.search.config.schema import Config
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG

OFF: dict[str, Any] = {"penalties": {}, "sparsifier": None}
NAMES = {"choices": ["magnitude", "rigl"]}


@pytest.mark.parametrize(
    ("changes", "space", "expected"),
    [
        (
            OFF,
            {"sparsifier": NAMES},
            "space 'sparsifier': 'magnitude' alone has sparsity 0 and does nothing; set s",
        ),
        (
            {"sparsifier": {"name": "set", "sparsity": 0.9}},
            {"sparsifier": NAMES},
            "'magnitude' alone has sparsity 0",
        ),
        (
            OFF,
            {"sparsifier": {"choices": ["nm", "rigl"]}},
            "space 'sparsifier': 'rigl' alone has sparsity 0",
        ),
        (
            {"sparsifier": "magnitude"},
            {"sparsifier.name": NAMES},
            "space 'sparsifier.name': changes nothing, since sp",
        ),
        (
            {"sparsifier": "rigl"},
            {"sparsifier.every": {"low": 1, "high": 9}},
            "changes nothing, since sparsifier.sparsity is 0",
        ),
        (
            OFF,
            {"penalties.layer.warmup": {"low": 0, "high": 1}},
            "changes nothing, since penalties.layer.strength is 0",
        ),
        (OFF, {"refit.lr": {"low": 0.1, "high": 0.2}}, "changes nothing, since refit.epochs is 0"),
        (
            {"one_shot": {"steps": 0}},
            {"one_shot.keep": {"low": 0.1, "high": 0.2}},
            "changes nothing, since one_shot.steps is 0",
        ),
        (
            {"training": {"optimizer": "adam"}},
            {"training.momentum": {"low": 0.1, "high": 0.9}},
            "changes nothing, since it is for sgd, and training.optimizer is adam; set training.op",
        ),
        (
            OFF,
            {"training.seed": {"low": 0, "high": 9}},
            "space 'training.seed': would have the search pick lucky seeds",
        ),
        (
            OFF,
            {"training.seed": {"choices": [1, 2]}},
            "space 'training.seed': would have the search pick lucky seeds",
        ),
    ],
)
def test_what_varies_to_no_effect_is_refused(
    tmp_path: Path, changes: dict[str, Any], space: dict[str, Any], expected: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(SMALL_CONFIG | changes | {"space": space}))
    with pytest.raises(UserError) as caught:
        load(file)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "space"),
    [
        ({"sparsifier": {"name": "set", "sparsity": 0.9}}, {"sparsifier.name": NAMES}),
        (
            {"sparsifier": "magnitude"},
            {"sparsifier.name": NAMES, "sparsifier.sparsity": {"low": 0, "high": 0.9}},
        ),
        (OFF, {"sparsifier": {"choices": ["nm", None]}}),
        (
            OFF,
            {
                "penalties.layer.strength": {"low": 0, "high": 1},
                "penalties.layer.warmup": {"low": 0, "high": 1},
            },
        ),
        (
            {"penalties": {"layer": {"layers": {"1": 2.0}}}},
            {"penalties.layer.warmup": {"low": 0, "high": 1}},
        ),
        (OFF, {"refit.epochs": {"low": 0, "high": 1}, "refit.lr": {"low": 0.1, "high": 0.2}}),
        ({"training": {"seed": 3}}, {"training.lr": {"low": 0.1, "high": 0.2}}),
        ({"training": {"optimizer": "sgd"}}, {"training.momentum": {"low": 0.1, "high": 0.9}}),
        (
            {},
            {
                "training.optimizer": {"choices": ["adam", "sgd"]},
                "training.momentum": {"low": 0.1, "high": 0.9},
            },
        ),
        (
            {"training": {"factory": "tests.trainables.loops:train"}},
            {"training.momentum": {"low": 0.1, "high": 0.9}},
        ),
    ],
)
def test_what_can_change_something_may_vary(changes: dict[str, Any], space: dict[str, Any]) -> None:
    Config.model_validate(SMALL_CONFIG | changes | {"space": space})
