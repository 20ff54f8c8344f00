"""Networks of several inputs as MLflow models, in a real store, loaded as MLflow loads them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from slimfront.search.record.trials import MeasuredNetwork, TrialRecord
from slimfront.search.tracking.models import log_model
from slimfront.search.tracking.store import connect
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.inputs import Several
from slimfront.trainables.shipping.formats import Shipped, shipped
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.training.train import train

HERE = "tests.trainables.test_inputs"


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    made = Candidate.model_validate(
        {
            "task": {"name": "classification", "output": "out"},
            "data": {"factory": f"{HERE}:data"},
            "model": {"factory": f"{HERE}:Two"},
            "training": {"epochs": 1, "seed": 0},
            "one_shot": {"steps": 0},
        }
    )
    return train(made).compacted.network, load_once(made.data, torch.device("cpu"), made.task)


POINT = MeasuredNetwork(TrialRecord(7, {}, 0), 3, {"val_accuracy": 0.5}, [], None)


def store_at(folder: Path) -> tuple[MlflowClient, str, str]:
    """A client of a new store, and the ids of an experiment and a run there."""
    uri = f"sqlite:///{folder}/store.db"
    connect(uri)
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(folder / "artifacts"))
    return client, experiment, client.create_run(experiment).info.run_id


@pytest.mark.parametrize("int8", [False, True])
def test_a_network_of_two_inputs_is_logged_and_loaded_back_by_mlflow(
    trained: tuple[Any, Any], int8: bool, tmp_path: Path
) -> None:
    network, data = trained
    client, experiment, run = store_at(tmp_path)
    inputs = data.raw(data.test.inputs[:2])
    quantised = as_int8(network, data) if int8 else None
    file = quantised.file if quantised else None
    found = log_model(client, experiment, run, POINT, shipped(network, data), inputs, file)
    assert log_model(client, experiment, run, POINT, shipped(network, data), inputs) == found
    uri_of_model = client.get_logged_model(found).artifact_location
    several = data.test.inputs[:6]
    assert isinstance(several, Several)
    with torch.no_grad():
        wanted = (quantised.network if quantised else network)(several).numpy()
    if int8:
        loaded = mlflow.pyfunc.load_model(uri_of_model)
        asked = {name: tensor.numpy() for name, tensor in several.named.items()}
        values = next(iter(loaded.predict(asked).values()))
        assert np.allclose(np.asarray(values), wanted, atol=1e-4)
        signature = loaded.metadata.signature
    else:
        # MLflow gives torch.export programs of several inputs no pyfunc.
        again = mlflow.pytorch.load_model(uri_of_model)
        made = again(several["x"], several["z"])  # type: ignore[call-overload]
        assert np.allclose(made.detach().numpy(), wanted, atol=1e-4)
        signature = mlflow.models.get_model_info(uri_of_model).signature
    assert signature.inputs.input_names() == ["x", "z"]


LIGHTNING = """
import sys
from slimfront.search.tracking.mlflow_internals import without_lightning
with without_lightning():
    import mlflow.pytorch
print("pytorch_lightning" in sys.modules)
print(hasattr(mlflow.pytorch, "nonsense"))
print(mlflow.pytorch.MlflowModelCheckpointCallback.__name__)
print("pytorch_lightning" in sys.modules)
"""


@pytest.mark.slow
def test_mlflow_is_had_without_lightning_which_comes_when_it_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHTNING], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", "MlflowModelCheckpointCallback", "True"]


def test_a_network_of_inputs_by_place_is_logged_and_takes_any_number_of_them(
    tmp_path: Path,
) -> None:
    class Difference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, both: Any) -> torch.Tensor:
            one, other = both.named.values()
            made: torch.Tensor = self.layer(one) - self.layer(other)
            return made

    client, experiment, run = store_at(tmp_path)
    network = Difference().eval()
    two = Several({"0": torch.randn(2, 4), "1": torch.randn(2, 4)})
    whole = Shipped(network, None, None).eval()
    found = log_model(client, experiment, run, POINT, whole, two)
    loaded = mlflow.pytorch.load_model(client.get_logged_model(found).artifact_location)
    seven = Several({"0": torch.randn(7, 4), "1": torch.randn(7, 4)})
    made = loaded(*seven.named.values())  # type: ignore[call-overload]
    torch.testing.assert_close(made, network(seven))
