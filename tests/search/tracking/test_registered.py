"""Weights from a real model registry."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

import slimfront as sf
from slimfront.search.config.loading import from_mapping
from slimfront.search.config.schema import Config
from slimfront.search.tracking.registered import with_weights_in_files
from slimfront.trainables.errors import UserError
from slimfront.trainables.models.weights import read_weights
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CONFIG

MLP: dict[str, Any] = {"name": "mlp", "depth": 2, "width": 8}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(3)
    made = Training(sf.Candidate.model_validate({"model": MLP, "training": {"epochs": 1}}))
    return made.model.eval()


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, network: torch.nn.Module
) -> Iterator[tuple[str, MlflowClient]]:
    """A store whose model `net` has the network as a program, as a pickle, and as a state dict."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/store.db"
    client = MlflowClient(uri)
    mlflow.set_tracking_uri(uri)
    experiment = client.create_experiment("e", artifact_location=str(folder / "artifacts"))
    example = torch.rand(2, *network_inputs(network)).numpy()
    try:
        for kind in ("pt2", "pickle"):
            with mlflow.start_run(experiment_id=experiment):
                mlflow.pytorch.log_model(
                    network,
                    name="m",
                    input_example=example,
                    serialization_format=kind,
                    registered_model_name="net",
                )
        with mlflow.start_run(experiment_id=experiment) as run:
            mlflow.pytorch.log_state_dict(network.state_dict(), artifact_path="state")
        client.create_model_version("net", f"runs:/{run.info.run_id}/state", run.info.run_id)
        client.set_registered_model_alias("net", "best", "1")
        yield uri, client
    finally:
        mlflow.set_tracking_uri(None)


def network_inputs(network: torch.nn.Module) -> tuple[int, ...]:
    layer = next(module for module in network.modules() if isinstance(module, torch.nn.Linear))
    return (layer.in_features,)


def config(folder: Path, uri: str, **changes: Any) -> Config:
    tree = SMALL_CONFIG | {"model": MLP, "tracking": {"uri": uri}} | changes
    tree["search"] = tree.get("search", {}) | {"storage_path": str(folder / "runs")}
    return from_mapping(tree)


@pytest.mark.slow
@pytest.mark.parametrize("registered", ["models:/net/1", "models:/net@best", "models:/net/3"])
def test_weights_of_the_registry_are_had_in_a_file(
    registry: tuple[str, MlflowClient],
    network: torch.nn.Module,
    tmp_path: Path,
    registered: str,
) -> None:
    asked = config(tmp_path, registry[0], model=MLP | {"weights": registered}, baseline="given")
    made = with_weights_in_files(asked)
    weights = read_weights(str(made.model.weights))
    wanted = network.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    # Once: what is there is not fetched anew.
    before = Path(str(made.model.weights)).stat().st_mtime_ns
    assert with_weights_in_files(asked) == made
    assert Path(str(made.model.weights)).stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_a_teacher_may_be_of_the_registry(
    registry: tuple[str, MlflowClient], tmp_path: Path, own: bool
) -> None:
    teacher: Any = MLP | {"weights": "models:/net/1"} if own else "models:/net/1"
    made = with_weights_in_files(config(tmp_path, registry[0], distill={"teacher": teacher}))
    assert made.distill is not None
    found = made.distill.teacher
    path = found if isinstance(found, str) else found.weights
    assert path is not None
    assert Path(path).parent == tmp_path / "runs" / "weights"
    assert re.fullmatch(r"net-1-[0-9a-f]{8}\.safetensors", Path(path).name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("registered", "said"),
    [
        ("models:/net/2", r"version 2 of net has neither a torch.export program nor a state dict"),
        ("models:/net/9", r"the registry of the tracking store has no models:/net/9"),
        ("models:/net@gone", r"the registry of the tracking store has no models:/net@gone"),
        ("models:/other/1", r"the registry of the tracking store has no models:/other/1"),
        ("models:/net", r"'models:/net' is not a model of the registry; write models:/NAME/V"),
    ],
)
def test_what_the_registry_does_not_have_is_one_sentence(
    registry: tuple[str, MlflowClient], tmp_path: Path, registered: str, said: str
) -> None:
    asked = config(tmp_path, registry[0], model=MLP | {"weights": registered}, baseline="given")
    with pytest.raises(UserError, match=rf"model\.weights: .*{said}"):
        with_weights_in_files(asked)


@pytest.mark.slow
def test_another_model_of_the_same_name_and_version_is_not_taken_for_it(
    registry: tuple[str, MlflowClient], tmp_path: Path
) -> None:
    client = registry[1]
    first = client.get_model_version("net", "1")
    model = MLP | {"weights": "models:/again/1"}
    files = []
    for version in ("1", "3"):
        client.create_registered_model("again")
        source = client.get_model_version("net", version)
        client.create_model_version("again", source.source, first.run_id)
        asked = config(tmp_path, registry[0], model=model, baseline="given")
        files.append(with_weights_in_files(asked).model.weights)
        client.delete_registered_model("again")
    assert files[0] != files[1]


def test_a_config_without_them_stays_as_it_is(tmp_path: Path) -> None:
    asked = config(tmp_path, f"sqlite:///{tmp_path}/none.db")
    assert with_weights_in_files(asked) is asked
    assert not (tmp_path / "none.db").exists()
