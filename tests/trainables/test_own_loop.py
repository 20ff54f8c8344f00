"""A function of the user's as the training of a trial."""

from pathlib import Path
from typing import Any

import pytest
import torch

import slimfront as sf
from slimfront.search.config.loading import from_mapping
from slimfront.search.engine.runner import run_search
from slimfront.search.record.export import export
from slimfront.trainables.messages import TrialOrder
from slimfront.trainables.packs import packable
from slimfront.trainables.trainable import CandidateTrainable
from slimfront.trainables.training.own_loop import OwnTraining
from tests.conftest import small_config
from tests.trainables import loops

MLP: dict[str, Any] = {"name": "mlp", "depth": 2, "width": 16}
SPARSE: dict[str, Any] = {"name": "channels", "sparsity": 0.5, "every": 4}


def candidate(function: str = "train", **changes: Any) -> sf.Candidate:
    training = {
        "factory": f"tests.trainables.loops:{function}",
        "epochs": 4,
        "batch_size": 128,
        "seed": 5,
    }
    tree: dict[str, Any] = {"model": MLP, "one_shot": {"steps": 0}}
    tree["training"] = training | changes.pop("training", {})
    return sf.Candidate.model_validate(tree | changes)


def test_a_function_trains_and_the_network_that_it_reports_is_measured() -> None:
    made = sf.train(candidate(sparsifier=SPARSE, training={"epochs": 8, "args": {"lr": 1e-2}}))
    assert [row["epoch"] for row in made.history] == list(range(1, 9))
    assert made.history[-1]["train_loss"] < made.history[0]["train_loss"]
    assert made.measures["params"] < 0.7 * (64 * 16 + 16 * 16 + 16 * 10)
    assert made.measures["val_accuracy"] > 0.5


def test_it_may_return_before_its_last_epoch() -> None:
    made = sf.train(candidate(training={"args": {"stop_after": 2}}))
    assert len(made.history) == 2


def test_it_may_exit_without_an_error() -> None:
    training = OwnTraining(candidate("leaves", training={"args": {"code": 0}}))
    while not training.done:
        training.run_epoch()
    assert training.epoch == 1
    training.close()


def test_an_average_of_the_weights_may_be_reported_as_torch_wraps_it() -> None:
    """What is kept of the network has the names of the network."""
    wanted = candidate("whole_average", compaction={"enabled": False})
    training = OwnTraining(wanted)
    while not training.done:
        training.run_epoch()
    made = training.finish(one_shot=False)
    training.close()
    own = training.model.state_dict()
    assert made.compacted.network.state_dict().keys() == own.keys()


def test_it_resumes_bit_exactly(tmp_path: Path) -> None:
    penalties = {"layer": {"strength": 1.0}, "cka": {"strength": 0.01, "every": 2}}
    wanted = candidate(sparsifier=SPARSE | {"name": "rigl"}, penalties=penalties)
    whole = OwnTraining(wanted)
    history = [whole.run_epoch() for _ in range(4)]
    first = OwnTraining(wanted)
    for _ in range(2):
        first.run_epoch()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.close()
    torch.manual_seed(99)
    second = OwnTraining(wanted)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.run_epoch() for _ in range(2)] == history[2:]
    for mine, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for training in (whole, second):
        assert training.done
        training.close()


@pytest.mark.parametrize(
    ("function", "changes", "said"),
    [
        ("without_slimming", {"sparsifier": SPARSE}, "did not call trial.slimming"),
        ("silent", {}, "returned without a report"),
        ("raises", {}, "ZeroDivisionError: no batches (loops.py, line"),
        ("never_steps", {"sparsifier": SPARSE}, "did not call slim.after_step()"),
        ("backwards", {}, "epoch 1 comes after epoch 2"),
        ("counts_steps", {}, "the epoch is 1001; it must be a whole number from 1 to"),
        ("reports_a_loss_first", {}, "the epoch is 1.5; it must be a whole number from 1 to"),
        ("diverges", {}, "diverged: train_loss is nan in epoch 1"),
        ("not_plain", {}, "state is no tensors and plain data"),
        ("says_words", {}, "a metric is a number, and 'note' is 'hello' (str)"),
        ("leaves", {"training": {"args": {"code": 3}}}, "SystemExit: 3 (loops.py, line"),
        ("nowhere", {}, "training factory 'tests.trainables.loops:nowhere'"),
    ],
)
def test_what_goes_wrong_fails_the_trial_with_its_reason(
    function: str, changes: dict[str, Any], said: str
) -> None:
    order = TrialOrder(candidate(function, **changes).model_dump(mode="json"), {"CPU": 1.0}, 0)
    trainable = CandidateTrainable(order.as_config())
    result = trainable.train()
    while result.get("failure") is None and not result["done"]:
        result = trainable.train()
    trainable.stop()
    assert said in str(result["failure"])


def test_a_trial_that_is_stopped_cleans_up() -> None:
    loops.ENDED.clear()
    training = OwnTraining(candidate("cleans_up"))
    training.run_epoch()
    training.close()
    assert loops.ENDED == ["cleaned up"]
    assert training.thread is not None
    assert not training.thread.is_alive()


def test_after_its_last_report_it_goes_on_to_its_end() -> None:
    loops.ENDED.clear()
    training = OwnTraining(candidate("cleans_up", training={"epochs": 1}))
    training.run_epoch()
    assert training.done
    training.close()
    assert loops.ENDED == ["cleaned up"]
    assert training.ended


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"factory": "a:b", "epochs": 0}}, "training.factory trains, and"),
        ({"training": {"args": {"lr": 1}}}, "training.args are for the function"),
        (
            {"training": {"factory": "a:b"}, "distill": {"teacher": "W", "features": {"1": 1.0}}},
            "distill.features are compared in slimfront's own loop",
        ),
        (
            {"training": {"factory": "a:b"}, "resources": {"processes": 2, "cpu": 2}},
            "training.factory is called in one process",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    config: dict[str, Any] = {
        "name": "x",
        "space": {"sparsifier.sparsity": {"low": 0.3, "high": 0.8}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    }
    with pytest.raises(sf.UserError) as caught:
        from_mapping(config | changes)
    assert said in str(caught.value)


def test_arguments_that_the_function_does_not_take_are_refused_before_training() -> None:
    with pytest.raises(sf.UserError, match=r"got an unexpected keyword argument 'nosuch'; it is"):
        OwnTraining(candidate(training={"args": {"nosuch": 1}}))


def test_it_is_not_packed() -> None:
    assert "a function of your own" in str(packable(candidate()))


@pytest.mark.slow
def test_a_search_of_a_function_has_a_front_that_ships(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        model=MLP,
        training={
            "factory": "tests.trainables.loops:train",
            "args": {"lr": 5e-3},
            "epochs": 6,
            "batch_size": 64,
        },
        penalties={},
        sparsifier=SPARSE,
        space={
            "sparsifier.sparsity": {"low": 0.3, "high": 0.6},
            "training.args.lr": {"low": 1e-3, "high": 1e-2},
        },
        objectives=["val_accuracy", "params"],
        search={"trials": 3, "early_stopping": {"grace": 2}},
    )
    result = run_search(config)
    assert {trial.status for trial in result.ledger.trials} <= {"completed", "stopped"}
    assert result.ledger.dense is not None
    assert result.ledger.dense.status == "completed"
    exported = export(result.search, str(tmp_path / "runs"), "best", tmp_path / "best.onnx")
    assert exported.shipment.difference < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_function_that_returns_early_has_its_last_network_pruned(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        model=MLP,
        training={
            "factory": "tests.trainables.loops:train",
            "args": {"stop_after": 2},
            "epochs": 6,
            "batch_size": 64,
            "report_every": 1,
        },
        penalties={},
        sparsifier=SPARSE,
        space={"sparsifier.sparsity": {"low": 0.3, "high": 0.6}},
        one_shot={"steps": 2, "refine": 0},
        objectives=["val_accuracy", "nonzero_params"],
        search={"trials": 1},
    )
    result = run_search(config)
    (trial,) = result.ledger.trials
    first, last = trial.points
    assert [first.pruned, len(last.pruned)] == [[], 2]
    assert all(point.file is not None for point in result.front)
    again = sf.load(result.search, storage_path=tmp_path / "runs")
    assert len(again.front) == len(result.front)
