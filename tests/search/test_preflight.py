"""What is tried of a config before a search."""

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from slimfront.search.config.schema import Config
from slimfront.search.engine.preflight import preflight
from slimfront.search.record.storage import check_place
from slimfront.trainables.errors import UserError

HERE = "tests.search.test_preflight"


def wide(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))


def never_a_number(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) - targets).float().mean() * float("nan")


def test_a_metric_that_is_no_number_is_named(caplog: pytest.LogCaptureFixture) -> None:
    metric = {"factory": f"{HERE}:never_a_number", "better": "smaller"}
    with caplog.at_level(logging.WARNING):
        preflight(config(10, metrics=[metric]))
    (said,) = [message for message in caplog.messages if "objective" in message]
    assert said.startswith("the objective val_never_a_number is nan for the untrained network; ")


def config(outputs: int, **task: Any) -> Config:
    return Config.model_validate(
        {
            "name": "wide",
            "data": "digits",
            "model": {"factory": f"{HERE}:wide", "args": {"outputs": outputs}},
            "task": {"name": "classification", **task},
            "space": {"training.lr": {"low": 1e-3, "high": 1e-2}},
        }
    )


def test_outputs_that_stand_for_no_class_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(config(30))
    (said,) = [message for message in caplog.messages if "logits" in message]
    assert said.startswith("the network gives 30 logits, and the data set has 10 classes: no ")
    assert "set task.classes" in said


def test_nothing_is_said_of_outputs_that_are_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(config(10))
        preflight(config(30, classes=30))
    assert not [message for message in caplog.messages if "logits" in message]


def small(**sections: Any) -> Config:
    plain: dict[str, Any] = {
        "name": "small",
        "data": "digits",
        "model": {"name": "mlp", "depth": 2, "width": 16},
        "training": {"epochs": 2},
        "penalties": {"node": {"strength": 1.0}},
        "space": {"training.lr": {"low": 1e-3, "high": 1e-2}},
    }
    return Config.model_validate(plain | sections)


NODE = {"strength": 1.0}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"space": {'penalties.node.layers["body.1"]': {"low": 0.1, "high": 1}}},
            "'body.1' is not a layer",
        ),
        (
            {
                "penalties": {},
                "space": {
                    "penalties": {
                        "choices": [{"node": NODE}, {"node": NODE | {"layers": {"z": 1}}}]
                    }
                },
            },
            "'z' is not a layer",
        ),
        ({"space": {"training.freeze": {"choices": [["1.*"], ["nosuch.*"]]}}}, "nosuch"),
        (
            {"space": {"training.lr_factors": {"choices": [{"1.*": 0.1}, {"nosuch.*": 2.0}]}}},
            "nosuch",
        ),
        (
            {
                "space": {
                    "sparsifier": {
                        "choices": [
                            {"name": "magnitude", "sparsity": 0.5},
                            {"name": "channels", "sparsity": 0.5, "exclude": ["nosuch"]},
                        ]
                    }
                }
            },
            "nosuch",
        ),
    ],
    ids=["a range", "a section", "freeze", "lr_factors", "sparsifier"],
)
def test_what_varies_is_looked_up_in_the_network_before_a_search(
    sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        preflight(small(**sections))


def test_what_training_is_over_before_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(
            small(
                search={"early_stopping": {"grace": 5}},
                penalties={"node": {"strength": 1.0, "ramp": 10}},
            )
        )
    assert "search.early_stopping stops no trial: its first rung is after 5 epochs" in caplog.text
    assert "penalties.node does not reach its strength" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        preflight(
            small(
                search={"early_stopping": {"grace": 1}},
                penalties={"node": {"strength": 1.0, "ramp": 2}},
            )
        )
    assert "early_stopping" not in caplog.text
    assert "strength" not in caplog.text


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "tpe", "n_ei_candidates": -1},
        {"name": "tpe", "prior_weight": -1.0},
    ],
)
def test_a_sampler_that_cannot_propose_is_refused(sampler: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it cannot propose with these options"):
        preflight(small(search={"sampler": sampler}))
    preflight(small(search={"sampler": {"name": "nsga2", "population_size": 10}}))


def test_a_place_that_nothing_can_be_written_to_is_refused(tmp_path: Path) -> None:
    check_place(str(tmp_path / "not" / "there"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="nothing can be written to /proc"):
        check_place("/proc/not/there")


def function(trial: Any, lr: float) -> None:
    """Of a user, which is not called before a search."""
    raise AssertionError


@pytest.mark.parametrize(
    ("training", "space", "said"),
    [
        ({"factory": f"{HERE}:nope"}, {}, "training factory 'tests.search.test_preflight:nope'"),
        ({"factory": "nowhere:train"}, {}, "nowhere"),
        ({"factory": "own.train"}, {}, "own.train"),
        (
            {"factory": f"{HERE}:function", "args": {"lr": 1, "moment": 1}},
            {},
            r"unexpected keyword argument 'moment'; it is function",
        ),
        (
            {"factory": f"{HERE}:function", "args": {"lr": 1}},
            {"training.args.lrr": {"low": 0.1, "high": 0.2}},
            "unexpected keyword argument 'lrr'",
        ),
    ],
)
def test_a_function_that_is_to_train_is_found_before_a_search(
    training: dict[str, Any], space: dict[str, Any], said: str
) -> None:
    plain = config(10).model_dump(mode="json", exclude_unset=True)
    shares = {"sparsifier.sparsity": {"low": 0.1, "high": 0.2}}
    own = plain | {"training": training, "sparsifier": "magnitude", "space": shares | space}
    with pytest.raises((UserError, ValueError), match=said):
        preflight(Config.model_validate(own))
