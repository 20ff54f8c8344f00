"""Weights from MLflow's model registry, in files that every process of a search can read."""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.artifacts
import safetensors.torch
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from torch import Tensor

from slimfront.search.config.names import is_bucket
from slimfront.search.config.schema import Config
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.models.base import Model
from slimfront.trainables.models.weights import SUFFIXES, read_weights

REGISTRY = "models:/"
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def with_weights_in_files(config: Config) -> Config:
    """The config with the path of a file in place of each `models:/NAME/VERSION` or
    `models:/NAME@ALIAS`, of `model.weights` and of `distill.teacher`.

    The registry is that of the tracking store. A model is a `torch.export` program, as MLflow keeps
    networks by default, or a state dict; neither runs code. Its weights lie in the folder `weights`
    of the search's storage, where they are looked for before the registry is asked.

    Raises:
        UserError: if the registry has no such model, it holds no weights that can be read as data,
            or the storage is a bucket.
    """
    changes: dict[str, Any] = {}
    if _is_registered(config.model.weights):
        changes["model"] = _of_file(config, config.model, "model.weights")
    teacher = config.distill.teacher if config.distill is not None else None
    if isinstance(teacher, Model) and _is_registered(teacher.weights):
        taught_by: Any = _of_file(config, teacher, "distill.teacher.weights")
    elif isinstance(teacher, str) and _is_registered(teacher):
        taught_by = str(_file_of(config, teacher, "distill.teacher"))
    else:
        taught_by = None
    if taught_by is not None and config.distill is not None:
        changes["distill"] = config.distill.model_copy(update={"teacher": taught_by})
    return config.model_copy(update=changes) if changes else config


def _is_registered(weights: str | None) -> bool:
    return weights is not None and weights.startswith(REGISTRY)


def _of_file(config: Config, model: Model, key: str) -> Model:
    return model.model_copy(update={"weights": str(_file_of(config, str(model.weights), key))})


def _file_of(config: Config, registered: str, key: str) -> Path:
    place = config.search.storage_path
    if is_bucket(place):
        raise UserError(
            f"{key}: {registered} is fetched into the storage of the search, which is a bucket, "
            "and weights are read from files; download it, and give the file"
        )
    uri = config.tracking.absolute_uri()
    found = _version_of(MlflowClient(uri), registered, key)
    file = Path(place, "weights", _file_name(found)).absolute()
    if not file.is_file():
        weights = _fetched(uri, found.name, str(found.version), key)
        file.parent.mkdir(parents=True, exist_ok=True)
        # A file of half its weights would be taken for the whole by the next search.
        beside = file.with_suffix(".part")
        safetensors.torch.save_file(weights, beside)
        beside.replace(file)
    return file


def _file_name(version: ModelVersion) -> str:
    """Another store may have another model of the name, and so may the same one later."""
    origin = f"{version.source} {version.creation_timestamp}"
    digest = hashlib.sha256(origin.encode()).hexdigest()[:8]
    return f"{version.name}-{version.version}-{digest}.safetensors"


def _version_of(client: MlflowClient, registered: str, key: str) -> ModelVersion:
    found = _REGISTERED.fullmatch(registered)
    if found is None:
        raise UserError(
            f"{key}: '{registered}' is not a model of the registry; write models:/NAME/VERSION or "
            "models:/NAME@ALIAS"
        )
    name = found["name"]
    try:
        if found["alias"]:
            return client.get_model_version_by_alias(name, found["alias"])
        return client.get_model_version(name, found["version"])
    except MlflowException as error:
        raise UserError(
            f"{key}: the registry of the tracking store has no {registered} ({first_line(error)}); "
            "tracking.uri says which store is meant"
        ) from None


def _fetched(uri: str, name: str, version: str, key: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{REGISTRY}{name}/{version}",
                dst_path=folder,
                tracking_uri=uri,
                registry_uri=uri,
            )
        except (MlflowException, OSError) as error:
            raise UserError(
                f"{key}: version {version} of {name} cannot be fetched ({first_line(error)})"
            ) from None
        for file in _files_of_weights(Path(folder)):
            weights = _weights_in(file)
            if weights is not None:
                return weights
    raise UserError(
        f"{key}: version {version} of {name} has neither a torch.export program nor a state dict; "
        "log it by mlflow.pytorch.log_model(network, serialization_format='pt2')"
    )


def _weights_in(file: Path) -> dict[str, Tensor] | None:
    """Each of a memory of its own, as safetensors wants them; None if they cannot be read without
    running code."""
    try:
        if file.suffix == ".pt2":
            found = torch.export.load(file).state_dict
        else:
            found = read_weights(str(file))
    except Exception:  # torch.export raises many kinds
        return None
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _files_of_weights(folder: Path) -> Iterator[Path]:
    """Programs first, then what may be a state dict."""
    yield from sorted(folder.rglob("*.pt2"))
    for suffix in SUFFIXES:
        yield from sorted(folder.rglob(f"*{suffix}"))
