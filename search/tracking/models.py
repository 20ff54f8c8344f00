"""Front members as MLflow models, which load on a machine without slimfront; and the model
registry."""

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from torch import Tensor

from slimfront.search.record.front.picks import Member, member_name
from slimfront.search.record.trials import MeasuredNetwork
from slimfront.search.tracking.mlflow_internals import without_lightning
from slimfront.search.tracking.write_queue import making
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.inputs import Several
from slimfront.trainables.shipping.shipped import Shipped, as_called

MODEL_TAG = "slimfront.model"
"""On a trial's run, followed by / and the network's name: the id of its logged model."""


def log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    point: MeasuredNetwork,
    network: Shipped,
    inputs: Tensor,
    int8: bytes | None = None,
) -> str:
    """Logs a front member's network as a model of its trial's run, once; returns the model's id.

    The model is a `torch.export` program (`pt2`) with signature and input example: MLflow and torch
    are all that loading needs. An int8 network is an ONNX file, which `mlflow.pyfunc` runs in ONNX
    Runtime.

    Args:
        network: takes inputs as they come (see `slimfront.trainables.shipping.Shipped`).
        inputs: (2, *input_shape) real inputs. One would fix the size of the batch.
        int8: the ONNX file of the network after quantisation, where that is what ships.
    """
    name = model_name(point.trial.label, point.epoch, point.step)
    known = client.get_run(run_id).data.tags.get(f"{MODEL_TAG}/{name}")
    if known:
        return known
    measures = {key: float(value) for key, value in point.measures.items()}
    measures |= point.tested or {}
    with tempfile.TemporaryDirectory() as folder, _quietly():
        path = Path(folder, "model")
        with making(f"the model of {point.name}"):
            _save_model(path, network, inputs.cpu(), int8, measures)
        tags = {
            "slimfront.trial": point.trial.label,
            "slimfront.epoch": str(point.epoch),
            "slimfront.one_shot": str(point.step),
        }
        params = {key: f"{value:g}" for key, value in measures.items()}
        model_id = _begun(client, experiment_id, run_id, name)
        if model_id is None:
            model_id = client.create_logged_model(
                experiment_id, name, run_id, tags=tags, params=params, model_type="compact network"
            ).model_id
        client.log_model_artifacts(model_id, str(path))
        client.finalize_logged_model(model_id, "READY")
    client.set_tag(run_id, f"{MODEL_TAG}/{name}", model_id)
    return str(model_id)


def _begun(client: MlflowClient, experiment_id: str, run_id: str, name: str) -> str | None:
    """The id of a run's model that was logged before, perhaps in part: its artifacts had no room,
    or its server died."""
    found = client.search_logged_models(
        [experiment_id], f"name = '{name}' AND source_run_id = '{run_id}'", max_results=1
    )
    if found:
        return str(found[0].model_id)
    return None


def _save_model(
    path: Path, network: Shipped, inputs: Tensor, int8: bytes | None, measures: dict[str, float]
) -> None:
    """Writes an MLflow model to the folder `path`; arguments as for `log_model`."""
    with torch.no_grad():
        outputs = network(inputs)
    example = _arrays(inputs)
    described = {
        "signature": infer_signature(example, outputs.numpy()),
        "metadata": {"slimfront": measures},
    }
    described |= {
        "pip_requirements": _requirements(
            "torch" if int8 is None else "onnxruntime", "mlflow", "numpy"
        )
    }
    if int8 is None:
        with without_lightning():
            import mlflow.pytorch

        mlflow.pytorch.save_model(
            as_called(network, inputs),
            str(path),
            input_example=tuple(example.values()) if isinstance(example, dict) else example,
            serialization_format="pt2",
            **described,
        )
    else:
        import mlflow.onnx
        import onnx

        mlflow.onnx.save_model(
            onnx.load_from_string(int8), str(path), input_example=example, **described
        )


def _arrays(inputs: Tensor) -> Any:
    """As MLflow takes them: an array, or arrays by name."""
    if isinstance(inputs, Several):
        return {name: tensor.numpy() for name, tensor in inputs.named.items()}
    return inputs.numpy()


def _requirements(*packages: str) -> list[str]:
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]


def mark_front(
    client: MlflowClient, experiment_id: str, run_ids: set[str], front: Sequence[MeasuredNetwork]
) -> None:
    """Tags the models of these runs with `slimfront.front`; those of networks that left the front
    in a later session stay."""
    members = {model_name(point.trial.label, point.epoch, point.step) for point in front}
    token = None
    while True:
        page = client.search_logged_models([experiment_id], max_results=100, page_token=token)
        for model in page:
            now = "false"
            if model.name in members:
                now = "true"
            if model.source_run_id in run_ids and model.tags.get("slimfront.front") != now:
                client.set_logged_model_tags(model.model_id, {"slimfront.front": now})
        token = page.token
        if not token:
            return


def model_name(trial: str, epoch: int, step: int) -> str:
    """What a front member's model is called: trial-007-epoch-30, and -one-shot-3 where it was
    pruned."""
    return f"{trial}-epoch-{epoch}" + (f"-one-shot-{step}" if step else "")


def register(client: MlflowClient, member: Member, name: str, search: str) -> int:
    """Puts a front member's model in the registry as the next version of `name`, with its measures
    as tags; returns that version.

    Raises:
        UserError: if its model is not in MLflow, or the registry does not take it.
    """
    wanted = model_name(member["trial"], member["epoch"], member.get("one_shot", 0))
    tags = {
        "slimfront.search": search,
        "slimfront.trial": member["trial"],
        "slimfront.network": member_name(member),
    }
    tags |= {
        key: f"{value:g}"
        for key, value in member.items()
        if isinstance(value, float | int) and not isinstance(value, bool)
    }
    if not re.fullmatch(r"[^/:.%\"'`]+", name):
        raise UserError(
            f"--name {name}: the name of a registered model has none of / : . % and quotes"
        )
    try:
        model_id = client.get_run(member["run_id"]).data.tags.get(f"{MODEL_TAG}/{wanted}")
        if model_id is None:
            raise UserError(
                f"MLflow has no model of {member_name(member)}: its network was lost before it "
                "could be logged, or MLflow cannot take it, which the search warned of; 'export' "
                "writes a file of it where its network is there"
            )
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = client.get_logged_model(model_id).artifact_location
        made = client.create_model_version(
            name, source, run_id=member["run_id"], tags=tags, model_id=model_id
        )
    except MlflowException as error:
        raise UserError(f"the model registry did not take it: {first_line(error)}") from None
    return int(made.version)


_LOUD = (
    "torch.export",
    "torch._dynamo",
    "mlflow.pytorch",
    "mlflow.models.model",
    "mlflow.utils.environment",
    "mlflow.types.utils",
    "mlflow.models.signature",
)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps MLflow and torch.export from talking about each model in the middle of a search's
    output.

    The first import of `mlflow.pytorch` sets the root logger to ERROR, which would hide our own
    warnings: that is undone too.
    """
    root = logging.getLogger()
    root_level = root.level
    root_handlers = root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        root.setLevel(root_level)
        root.handlers[:] = root_handlers
