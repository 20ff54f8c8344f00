"""Whole layers that go when the training of a candidate is over."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import run_search
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.depth import shallower
from slimfront.trainables.depth.removal import without_layers
from slimfront.trainables.depth.shallower import asked_for, judged_on
from slimfront.trainables.errors import UserError
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.rehearsal import rehearse
from slimfront.trainables.training.train import train
from tests.conftest import small_config

RESNET: dict[str, Any] = {
    "model": {"name": "resnet20", "width": 4, "depth": 14},
    "training": {"epochs": 1, "batch_size": 256, "lr": 0.01, "seed": 5},
    "refit": {"epochs": 1},
    "one_shot": {"steps": 0},
}


def resnet(depth: dict[str, Any] | None = None, **changes: Any) -> Candidate:
    asked = {"when": "trained"} | (depth or {})
    return Candidate.model_validate(RESNET | changes | {"depth": asked})


def gone(steps: Any) -> list[str]:
    return [name for name, action, _ in steps if action == "pruned"]


def test_layers_go_before_the_refit_and_are_named() -> None:
    whole = train(resnet())
    smaller = train(resnet(depth={"layers": 2}))
    names = gone(smaller.compacted.report.steps)
    assert len(names) == 2
    assert smaller.measures["layers"] < whole.measures["layers"]
    assert smaller.measures["params"] < whole.measures["params"]
    # The epoch of training is the same, and the refit follows what went.
    assert smaller.history[0]["train_loss"] == whole.history[0]["train_loss"]
    assert smaller.history[1]["train_loss"] != whole.history[1]["train_loss"]


def test_a_name_of_no_layer_is_refused_and_a_target_that_is_met_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match="exclude: 'nowhere' is no layer of the network"):
        train(resnet(depth={"layers": 1, "exclude": ["nowhere"]}))
    train(resnet(depth={"target": {"layers": 100}}))
    assert sum("no layer goes" in message for message in caplog.messages) == 1


def test_what_is_left_is_fitted_to_the_whole_network() -> None:
    """Outputs are nearer to those of the whole network than without the layers alone."""
    training = Training(resnet(depth={"layers": 3}), "cpu")
    try:
        training.run_epoch()
        network, data = training.network.eval(), training.data
        batches = judged_on(data)
        options = training.candidate.depth
        fitted, steps = shallower(network, data, options)
        asked = asked_for(options, None, at_most=False)
        plain, same = without_layers(network, batches, asked, data.task.loss)
        assert [step[0] for step in steps] == [step[0] for step in same]
        inputs = data.prepare(data.validation.inputs)
        with torch.no_grad():
            wanted = network(inputs)
            errors = [float((each(inputs) - wanted).square().mean()) for each in (fitted, plain)]
        assert errors[0] < 0.5 * errors[1]
    finally:
        training.close()


def test_what_is_excluded_stays() -> None:
    first = gone(train(resnet(depth={"layers": 1})).compacted.report.steps)
    others = gone(train(resnet(depth={"layers": 1, "exclude": first})).compacted.report.steps)
    assert others
    assert others != first


def test_nothing_goes_before_training_is_over() -> None:
    candidate = resnet(depth={"layers": 2}, training=RESNET["training"] | {"epochs": 2})
    training = Training(candidate, "cpu")
    try:
        training.run_epoch()
        assert not gone(training.finish(one_shot=False).compacted.report.steps)
        training.run_epoch()
        assert len(gone(training.finish(one_shot=False).compacted.report.steps)) == 2
    finally:
        training.close()


def test_more_layers_than_there_are_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"^depth.layers: 50: no more than \d+ can be taken out"):
        rehearse(resnet(depth={"layers": 50}))


def test_where_training_leaves_fewer_layers_all_go_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training(resnet(depth={"layers": 50}), "cpu")
    try:
        training.run_epoch()
        with caplog.at_level(logging.WARNING):
            found = training.finish(one_shot=False)
    finally:
        training.close()
    count = len(gone(found.compacted.report.steps))
    assert count > 1
    assert f"depth.layers: 50: {count} layers were taken out" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": {"layers": 1}, "refit": {"epochs": 0}}, "it needs a refit; set refit.epochs"),
        ({"depth": {"criterion": "cak"}}, "there is no criterion 'cak'; did you mean 'cka'"),
        (
            {"depth": {"layers": 1}, "compaction": {"approximate": True}},
            "the refit is before it; leave one of them out",
        ),
        ({"depth": {"layers": -1}}, "greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        resnet(**changes)


def config(directory: Path, **changes: Any) -> Config:
    tree = {
        "model": {"name": "mlp", "depth": 4, "width": 16},
        "training": {"epochs": 3, "batch_size": 256, "lr": 0.01},
        "penalties": {},
        "sparsifier": None,
        "space": {"depth.layers": {"choices": [0, 2]}},
        "objectives": ["val_accuracy", "layers"],
        "search": {"trials": 2},
    }
    return small_config(directory, **tree | changes)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("ray_session")
def test_a_search_has_networks_of_several_depths_on_its_front(tmp_path: Path) -> None:
    result = run_search(config(tmp_path))
    depths = {trial.values["depth.layers"]: trial for trial in result.ledger.trials}
    assert set(depths) == {0, 2}
    last = depths[2].last
    assert last is not None
    assert len(gone(last.compaction)) == 2
    assert depths[2].measures["layers"] < depths[0].measures["layers"]


def test_a_depth_that_no_network_has_is_refused_before_the_search(tmp_path: Path) -> None:
    from slimfront.search.engine.preflight import preflight

    wide = config(tmp_path, space={"depth.layers": {"low": 0, "high": 40}})
    with pytest.raises(UserError, match=r"depth.layers: 40: no more than"):
        preflight(wide)


def test_a_criterion_that_never_judges_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"depth.layers is 0; set it, or let it vary"):
        config(tmp_path, space={"depth.criterion": {"choices": ["cka", "cosine"]}})
