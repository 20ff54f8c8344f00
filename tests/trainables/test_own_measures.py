"""Measures of the user's: what they are called with, and what is said where they go wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS, DONE, SHOULD_CHECKPOINT
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.search.config.schema import Config
from slimfront.search.engine.preflight import preflight
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.own import TAKEN
from slimfront.trainables.messages import NetworkReport, Report
from slimfront.trainables.training.loop import Training

HERE = "tests.trainables.test_own_measures"


def weights(network: nn.Module, inputs: Tensor, per: float = 1.0) -> float:
    assert not network.training
    assert network(inputs).shape == (len(inputs), 10)
    return per * sum(int(p.count_nonzero()) for p in network.parameters())


def spoils(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        inputs.zero_()
    network.train()
    return torch.tensor(3.0)


def kilobytes(path: str) -> float:
    return Path(path).stat().st_size / 1000


def raises(network: nn.Module, inputs: Tensor) -> float:
    raise RuntimeError("the meter is off\nand on")


def not_a_number(network: nn.Module, inputs: Tensor) -> float:
    return float("nan")


def constant(network: nn.Module, inputs: Tensor, of: float = 0.0) -> float:
    return of


def a_word(network: nn.Module, inputs: Tensor) -> str:
    return "much"


def two(network: nn.Module, inputs: Tensor) -> Tensor:
    return torch.zeros(2)


def candidate(*measures: dict[str, Any], **changes: Any) -> Candidate:
    return Candidate.model_validate(
        {
            "model": {"name": "mlp", "depth": 1, "width": 8},
            "training": {"epochs": 1, "seed": 0},
            "one_shot": {"steps": 1},
            "measures": list(measures),
            **changes,
        }
    )


def own(function: str, name: str = "mine", **options: Any) -> dict[str, Any]:
    return {"name": name, "factory": f"{HERE}:{function}", **options}


def test_a_measure_is_taken_of_every_network_with_its_arguments() -> None:
    done = train(candidate(own("weights", args={"per": 2}), own("kilobytes", "kb", on="onnx")))
    for network in (done, *done.pruned):
        assert network.measures["mine"] == 2 * network.measures["nonzero_params"]
        assert 1 < network.measures["kb"] < 100


def test_what_a_measure_does_to_the_network_stays_without_effect() -> None:
    plain = train(candidate())
    spoilt = train(candidate(own("spoils")))
    assert spoilt.measures == plain.measures | {"mine": 3.0}
    assert [one.measures["nonzero_params"] for one in spoilt.pruned] == [
        one.measures["nonzero_params"] for one in plain.pruned
    ]
    assert not spoilt.compacted.network.training


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised RuntimeError: the meter is off"),
        ("not_a_number", "gave nan; it must be a finite number"),
        ("a_word", "raised ValueError: could not convert string to float"),
        ("two", "raised ValueError: only one element tensors can be converted"),
    ],
)
def test_a_measure_that_gives_no_number_is_one_sentence_before_training(
    function: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(candidate(own(function)))
    named = f"the network cannot be measured: the measure 'mine' ({HERE}:{function})"
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="there is no 'weight' in it; did you mean 'weights'"):
        train(candidate(own("weight")))


def test_names_that_mean_something_else_are_taken() -> None:
    """Measures stand beside them in results of Ray Tune, in MLflow and in front.json."""
    network = NetworkReport({}, [])
    reported = Report([], 1, network, (), None).as_result() | Report([], failure="").as_result()
    made = Training(candidate())
    epoch = made.run_epoch()
    made.close()
    for name in {*reported, *epoch, *AUTO_RESULT_KEYS, *DEBUG_METRICS, DONE, SHOULD_CHECKPOINT}:
        assert name in TAKEN or name.startswith("val_"), name


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (["latency"], "unknown extra measure 'latency'; did you mean 'latency_ms'"),
        ([own("weights", "params")], "the measure 'params' has a name that is taken"),
        ([own("weights", "val_x")], "the measure 'val_x' has a name that is taken"),
        ([own("weights", "test_x")], "the measure 'test_x' has a name that is taken"),
        ([own("weights", "done")], "the measure 'done' has a name that is taken"),
        ([own("weights", "lr")], "the measure 'lr' has a name that is taken"),
        ([own("weights"), own("two")], "the measure 'mine' is named twice"),
        ({"mine": 3}, "the measure 'mine' is 3; it needs a 'factory'"),
        ([own("weights", better="more")], "Input should be 'larger' or 'smaller'"),
    ],
)
def test_measures_that_are_wrong_in_themselves_are_refused(measures: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Candidate.model_validate({"measures": measures})


@pytest.mark.parametrize(
    ("scale", "better", "wanted", "least"),
    [
        ("ratio", "smaller", -1.0, "0 or more"),
        ("log", "smaller", -0.5, "0 or more"),
        ("ratio", "larger", 0.0, "above 0"),
        ("log", "larger", -3.0, "above 0"),
    ],
)
def test_a_scale_of_sizes_has_no_place_for_what_is_negative(
    scale: str, better: str, wanted: float, least: str
) -> None:
    with pytest.raises(UserError) as caught:
        train(candidate(own("constant", args={"of": wanted}, scale=scale, better=better)))
    assert str(caught.value) == (
        f"the network cannot be measured: the measure 'mine' ({HERE}:constant) gave {wanted:g}, "
        f"and 'scale: {scale}' is for numbers that are {least}; give it 'scale: relative'"
    )
    done = train(candidate(own("constant", args={"of": wanted}, better=better)))
    assert done.measures["mine"] == wanted


@pytest.mark.parametrize("scale", ["ratio", "log"])
def test_nothing_can_be_compared_with_a_dense_network_of_0(scale: str) -> None:
    tree: dict[str, Any] = {
        "name": "own",
        "data": "digits",
        "model": {"name": "mlp", "depth": 1, "width": 8},
        "measures": {"mine": {"factory": f"{HERE}:constant", "scale": scale}},
        "space": {"training.lr": {"low": 1e-3, "high": 1e-2}},
        "objectives": ["val_accuracy", "mine"],
    }
    with pytest.raises(
        UserError, match=r"is 0 for the dense network, .* give it 'scale: relative'"
    ):
        preflight(Config.model_validate(tree))
    tree["measures"]["mine"]["scale"] = "relative"
    assert preflight(Config.model_validate(tree))["mine"] == 0


@pytest.mark.slow
def test_an_int8_network_has_measures_of_its_file_only() -> None:
    with pytest.raises(ValidationError, match=r"'mine' is of a network in torch, .*'on: onnx'"):
        candidate(own("weights"), int8=True)
    done = train(candidate(own("kilobytes", on="onnx"), int8=True))
    assert done.measures["mine"] == done.measures["bytes"] / 1000


def test_a_measure_is_an_objective_and_a_constraint_of_a_config() -> None:
    tree: dict[str, Any] = {
        "name": "own",
        "measures": {"mine": {"factory": f"{HERE}:weights", "better": "larger"}},
        "space": {"training.lr": {"low": 1e-3, "high": 1e-2}},
        "objectives": ["val_accuracy", "mine"],
        "constraints": {"mine": ">= 10"},
    }
    config = Config.model_validate(tree)
    assert [one.goodness(2.0) for one in config.chosen_objectives()] == [2.0, 2.0]
    assert config.chosen_constraints()[0].met_by({"mine": 11})
    with pytest.raises(ValidationError, match="unknown objective 'mind'; did you mean 'mine'"):
        Config.model_validate(tree | {"objectives": ["val_accuracy", "mind"]})
