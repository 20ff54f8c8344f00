"""Searches that begin with a network which somebody has trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

import slimfront as sf
from slimfront.search.config.loading import from_mapping
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import SearchResult
from slimfront.trainables.training.loop import Training
from tests.conftest import small_config
from tests.search.searches import runs_of

MLP: dict[str, Any] = {"name": "mlp", "depth": 2, "width": 32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The weights of a network of the digits, and its validation accuracy."""
    torch.set_num_threads(1)
    candidate = sf.Candidate.model_validate(
        {"model": MLP, "training": {"epochs": 15, "lr": 3e-3, "seed": 4}}
    )
    training = Training(candidate)
    for _ in range(15):
        metrics = training.run_epoch()
    path = tmp_path_factory.mktemp("trained") / "mlp.pt"
    torch.save(training.model.state_dict(), path)
    return path, metrics["val_accuracy"]


def search(tmp_path: Path, weights: Path, **changes: Any) -> SearchResult:
    config = small_config(
        tmp_path,
        **{
            "model": MLP | {"weights": str(weights)},
            "penalties": {},
            "space": {"sparsifier.sparsity": {"low": 0.2, "high": 0.4}},
            "objectives": ["val_accuracy", "params"],
            "sparsifier": {"name": "channels", "every": 2, "sparsity": 0.5},
            "search": {"trials": 2},
            "training": {"epochs": 2, "batch_size": 32, "lr": 3e-3},
        }
        | changes,
    )
    return run_search(config)


def test_the_baseline_is_the_network_as_it_is_given(
    tmp_path: Path, trained: tuple[Path, float]
) -> None:
    weights, accuracy = trained
    result = search(tmp_path, weights)
    dense = result.ledger.dense_network
    assert dense is not None
    assert dense.epoch == 0
    assert dense.measures["val_accuracy"] == accuracy
    assert [trial.status for trial in result.ledger.trials] == ["completed"] * 2
    # Two epochs from random weights end far below.
    assert max(point.measures["val_accuracy"] for point in result.front) > accuracy - 0.06
    assert min(point.measures["params"] for point in result.front) < dense.measures["params"]
    parent, children = runs_of(tmp_path, result)
    assert children["dense"].data.metrics["val_accuracy"] == accuracy
    assert parent.data.params["model.weights"] == str(weights)


@pytest.mark.slow
def test_a_network_is_pruned_without_training(tmp_path: Path, trained: tuple[Path, float]) -> None:
    weights, accuracy = trained
    result = search(tmp_path, weights, training={"epochs": 0}, one_shot={"steps": 3})
    assert [trial.status for trial in result.ledger.trials] == ["completed"] * 2
    points = [point for point in result.front if point.trial.number is not None]
    assert all(point.epoch == 0 for point in points)
    assert any(point.step for point in points)
    whole = result.ledger.dense_network
    assert whole is not None and whole.measures["val_accuracy"] == accuracy
    assert all(point.measures["params"] < whole.measures["params"] for point in points)


@pytest.mark.slow
def test_a_network_that_is_not_trained_is_refitted(
    tmp_path: Path, trained: tuple[Path, float]
) -> None:
    weights, accuracy = trained
    result = search(
        tmp_path,
        weights,
        training={"epochs": 0, "batch_size": 32},
        one_shot={"steps": 0},
        refit={"epochs": 3, "lr": 3e-3},
        space={"sparsifier.sparsity": {"low": 0.2, "high": 0.3}},
    )
    (first, *_) = result.front
    assert first.epoch == 3
    assert first.measures["val_accuracy"] > accuracy - 0.06


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "given"}, "baseline: given is the network with the weights of model.weights"),
        (
            {"training": {"epochs": 0}},
            "training.epochs is 0, so that the baseline would have random",
        ),
        (
            {
                "training": {"epochs": 0},
                "model": MLP | {"weights": "W"},
                "penalties": {"layer": {"strength": 1.0}},
            },
            "penalties.layer acts while training, and training.epochs is 0",
        ),
        ({"baseline": "dense"}, "it should be 'given' or 'trained'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    config: dict[str, Any] = {
        "name": "x",
        "space": {"sparsifier.sparsity": {"low": 0.2, "high": 0.4}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    }
    with pytest.raises(sf.UserError) as caught:
        from_mapping(config | changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["magnitude", "channels", "snip", "random", "nm"])
def test_a_method_that_needs_none_meets_its_target_at_once(
    name: str, trained: tuple[Path, float]
) -> None:
    sparsifier = {"name": name} | ({} if name == "nm" else {"sparsity": 0.5})
    candidate = sf.Candidate.model_validate(
        {
            "model": MLP | {"weights": str(trained[0])},
            "training": {"epochs": 0},
            "sparsifier": sparsifier,
            "one_shot": {"steps": 0},
        }
    )
    made = sf.train(candidate)
    assert made.history == []
    whole = 64 * 32 + 32 * 32 + 32 * 10
    assert made.measures["nonzero_params"] < 0.65 * whole


def test_frozen_parameters_and_statistics_stay() -> None:
    candidate = sf.Candidate.model_validate(
        {
            "model": {"name": "resnet20", "depth": 8, "width": 4},
            "data": {
                "name": "factory",
                "factory": "tests.trainables.data.made:image_tensors",
                "args": {"count": 80},
            },
            "training": {
                "epochs": 2,
                "batch_size": 20,
                "lr": 0.1,
                "freeze": ["0.*", "1.*", "3.*"],
            },
            "penalties": {"connection": {"strength": 1.0}},
            "refit": {"epochs": 1},
        }
    )
    training = Training(candidate)
    names = [name for name, _ in training.model.named_parameters()]
    frozen = [n for n in training.model.state_dict() if n.startswith(("0.", "1.", "3."))]
    assert frozen, names
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    for _ in range(2):
        training.run_epoch()
    after = training.model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name in frozen), name
    assert training.finish().history


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        (["stm.*"], "no parameter of the network is called 'stm.*'"),
        (["*"], "none is left to train"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(freeze: list[str], said: str) -> None:
    candidate = sf.Candidate.model_validate({"model": MLP, "training": {"freeze": freeze}})
    with pytest.raises(sf.UserError) as caught:
        Training(candidate)
    assert said in str(caught.value)


class Halved(torch.nn.Sequential):
    """A network whose first layer its factory froze."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Flatten(),
            torch.nn.Linear(64, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 10),
        )
        self[1].requires_grad_(False)


def test_what_a_factory_froze_stays_under_penalties_and_in_a_refit() -> None:
    candidate = sf.Candidate.model_validate(
        {
            "model": {"factory": "tests.search.test_pretrained:Halved"},
            "training": {"epochs": 1, "lr": 0.01},
            "penalties": {"connection": {"strength": 1.0}},
            "refit": {"epochs": 1},
            "compaction": {"enabled": False},
            "one_shot": {"steps": 0},
        }
    )
    training = Training(candidate)
    before = training.model[1].weight.clone()  # type: ignore[index]
    training.run_epoch()
    assert torch.equal(training.model[1].weight, before)  # type: ignore[index]
    network = training.finish().compacted.network
    assert torch.equal(network[1].weight, before)  # type: ignore[index]
    assert (network[3].weight == 0).any()  # type: ignore[index]


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.second = torch.nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.second(self.first(x.flatten(1)).relu()).relu())
        return made


def test_a_shared_weight_is_frozen_by_any_of_its_names() -> None:
    candidate = sf.Candidate.model_validate(
        {
            "model": {"factory": "tests.search.test_pretrained:Tied"},
            "training": {"epochs": 1, "freeze": ["second.weight"]},
        }
    )
    training = Training(candidate)
    before = training.model.first.weight.clone()  # type: ignore[union-attr, operator]
    training.run_epoch()
    assert torch.equal(training.model.first.weight, before)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({}, False),
        ({"distill": {"teacher": "baseline"}}, True),
        ({"distill": {"teacher": "baseline", "weight": 0}}, False),
        (
            {
                "distill": {"teacher": "baseline", "weight": 0},
                "space": {"distill.weight": {"low": 0.0, "high": 0.9}},
            },
            True,
        ),
        ({"distill": {"teacher": "W"}, "model": MLP | {"weights": "W"}}, False),
        ({"distill": {"teacher": "baseline"}, "model": MLP | {"weights": "W"}}, False),
        (
            {
                "distill": {"teacher": "baseline"},
                "model": MLP | {"weights": "W"},
                "baseline": "trained",
            },
            True,
        ),
    ],
)
def test_a_search_waits_for_a_baseline_that_it_trains_and_that_teaches(
    changes: dict[str, Any], waits: bool
) -> None:
    config: dict[str, Any] = {
        "name": "x",
        "model": MLP,
        "space": {"sparsifier.sparsity": {"low": 0.3, "high": 0.8}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    }
    assert from_mapping(config | changes).waits_for_baseline == waits
