"""What is tried of a config before a search."""

import logging
from typing import Any

import pytest
from torch import Tensor, nn

from slimfront.search.config.schema import Config
from slimfront.search.engine.preflight import preflight

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
