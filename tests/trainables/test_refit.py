import copy

import pytest
import torch

from slimfront import Candidate, train
from slimfront.trainables.data import Dataset, Digits, load_once
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.models import MLP
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.refit import Refit, refit
from tests.conftest import SMALL_CANDIDATE


@pytest.fixture
def data() -> Dataset:
    return load_once(Digits(), torch.device("cpu"))


def fitted(
    data: Dataset, options: Refit
) -> tuple[torch.nn.Module, torch.nn.Module, list[dict[str, float]]]:
    """A sparse network, the same after refit, and the metrics of refit."""
    torch.manual_seed(0)
    network = MLP(depth=2, width=16).build(data.input_shape, data.head)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(torch.rand_like(parameter) > 0.5)
    before = copy.deepcopy(network)
    generators = {name: torch.Generator().manual_seed(0) for name in ("shuffler", "augmenter")}
    return (
        before,
        network,
        refit(network, data, options, optimizer="adam", momentum=0.9, batch_size=64, **generators),
    )


def test_refit_learns_and_zeros_stay_zero(data: Dataset) -> None:
    before, after, history = fitted(data, Refit(epochs=5, lr=0.01))
    assert len(history) == 5
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)


def test_no_epochs_change_nothing(data: Dataset) -> None:
    before, after, history = fitted(data, Refit(epochs=0))
    assert history == []
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )


def test_a_refit_that_diverges_fails(data: Dataset) -> None:
    with pytest.raises(TrialFailure, match="the loss of refit is"):
        fitted(data, Refit(epochs=3, lr=1e30))


def test_a_candidate_is_refitted_after_compaction_and_measured_after_that() -> None:
    tree = SMALL_CANDIDATE | {"penalties": {"layer": {"strength": 1000.0}}}
    plain = train(Candidate.model_validate(tree))
    trained = train(Candidate.model_validate(tree | {"refit": {"epochs": 4, "lr": 0.01}}))
    assert trained.history[:3] == plain.history
    assert [epoch["epoch"] for epoch in trained.history] == [1, 2, 3, 4, 5, 6, 7]
    assert trained.measures["val_accuracy"] == trained.history[-1]["val_accuracy"]
    assert trained.measures["layers"] == plain.measures["layers"] == 2
    assert trained.measures["val_accuracy"] > plain.measures["val_accuracy"]
    assert trained.measures["nonzero_params"] <= plain.measures["nonzero_params"]


def dropping() -> torch.nn.Module:
    """It draws numbers when it is trained, and so does augmentation."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 32),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(32, 10),
    )


def test_networks_on_the_way_are_refitted_and_training_does_not_notice() -> None:
    """A refit of what is reported before the end draws no random number of the training, and says
    what it cost."""

    def run(when: str) -> tuple[list[dict[str, float]], dict[str, float]]:
        tree = SMALL_CANDIDATE | {
            "data": {"name": "digits", "augment": {"crop": 1}},
            "model": {"factory": "tests.trainables.test_refit:dropping"},
            "refit": {"epochs": 2, "lr": 0.01, "when": when},
        }
        training = Training(Candidate.model_validate(tree))
        reported = []
        while not training.done:
            training.run_epoch()
            made = training.finish(one_shot=False)
            reported.append(dict(made.measures))
        return reported, made.history

    (*early, last), history = run("end")
    (*refitted, last_again), history_again = run("reports")
    assert last == last_again
    assert history == history_again
    assert "recovery_epochs" not in last
    for before, after in zip(early, refitted, strict=True):
        assert "recovery_epochs" not in before
        assert after["recovery_epochs"] == 2
        assert after["val_accuracy"] > before["val_accuracy"]


def test_a_refit_of_reports_without_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="set epochs to 1 or more"):
        Refit(when="reports")


def test_a_refit_on_the_way_that_fails_costs_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"epochs": 1, "lr": 1e30, "when": "reports"}
    training = Training(Candidate.model_validate(SMALL_CANDIDATE | {"refit": options}))
    training.run_epoch()
    made = training.finish(one_shot=False)
    assert "recovery_epochs" not in made.measures
    assert "epoch 1 is reported without its refit: diverged" in caplog.text
