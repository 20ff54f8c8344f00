"""Where MLflow keeps things: connecting to a store, and refusing one that does not answer."""

import contextlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from slimfront.search.record.locate import name_in_store
from slimfront.trainables.environment import environment_set
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.redaction import without_secrets

Client = MlflowClient
"""What a store is used by."""

# The tag that makes the UI open an experiment in its model-training mode, not the GenAI mode.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_CLIENTS = ("botocore", "boto3", "urllib3", "google", "azure")
"""Libraries that MLflow reaches artifacts by, whose errors have no common base."""
_PROBE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
# MLflow's own are 7 retries that double their wait and 120 s: one write to a dead server would take
# minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def connect(uri: str, *, writes: bool = False) -> MlflowClient:
    """A client of the tracking store at `uri`; an SQLite file is created if it is missing.

    Args:
        writes: whether something will be written.

    Raises:
        UserError: if the store does not answer within a few seconds, is no MLflow server, or cannot
            be written to.
    """
    _check_file(uri, writes=writes)
    # It logs the traceback of each write that a database does not take, beside raising it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A line for each attempt, of which the last is told by whoever waits for it.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Two lines at the end of every run.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    client: MlflowClient
    try:
        with environment_set(_PROBE):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            unknown = client.get_experiment_by_name(f"slimfront-{secrets.token_hex(8)}")
    except Exception as error:  # every store raises its own kinds
        if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):
            raise UserError(
                f"the tracking store at {without_secrets(uri)} refuses the user or the password; "
                "set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD"
            ) from None
        raise UserError(
            f"the tracking store at {without_secrets(uri)} does not answer ({_deepest(error)}); "
            "start it, or set tracking.uri to one that runs"
        ) from None
    if unknown is not None:  # whatever answers everything alike has an experiment of any name
        raise UserError(
            f"what answers at {without_secrets(uri)} is no MLflow server (it claims to have an "
            "experiment of a random name); "
            "set tracking.uri to one"
        )
    return client


def check_store(uri: str) -> None:
    """Finds out whether a search could write to the store at `uri`, and makes nothing there.

    Raises:
        UserError: as `connect`.
    """
    scheme, _, path = uri.partition(":///")
    file = Path(path.partition("?")[0])
    if scheme != "sqlite" or file.exists():
        connect(uri, writes=True)
        return
    _check_file(uri, writes=True)
    # What it was tried with.
    with contextlib.suppress(OSError):
        if not file.stat().st_size:
            file.unlink()


def _check_file(uri: str, *, writes: bool) -> None:
    """Raises UserError if an SQLite file cannot be made or written to, which MLflow would try for
    two minutes."""
    scheme, _, path = uri.partition(":///")
    if scheme != "sqlite" or not path or path.startswith(":memory:"):
        return
    file = Path(path.partition("?")[0])
    if file.exists() and not writes:
        return
    there = file.exists()
    reason = ""
    try:
        if not there and not file.parent.is_dir():
            reason = f"there is no folder {file.parent}"
        else:
            with contextlib.closing(
                sqlite3.connect(file, timeout=1.0, isolation_level=None)
            ) as database:
                database.execute("BEGIN IMMEDIATE")
                # SQLite opens what it may only read without a word.
                database.execute("CREATE TABLE slimfront_may_write (a)")
                database.execute("ROLLBACK")
    except sqlite3.Error as error:
        busy = getattr(error, "sqlite_errorcode", None) in (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
        )
        reason = ""
        if not busy:
            reason = str(error)
    if reason:
        raise UserError(
            f"the tracking store {file} cannot be written to ({reason}); make its folder writable, "
            "with room on its disk, or set "
            "tracking.uri to another"
        )


@contextmanager
def taking_writes(uri: str, command: str) -> Iterator[None]:
    """Around the first writes of a search.

    Args:
        command: what goes on where this ended.

    Raises:
        UserError: if the store at `uri` does not take them.
    """
    try:
        yield
    except Exception as error:
        if not is_of_a_store(error):
            raise
        raise UserError(
            f"the tracking store at {without_secrets(uri)} does not take what is written "
            f"({_deepest(error)}); see that it has room and may be written to, then `{command}`"
        ) from None


def is_of_a_store(error: Exception) -> bool:
    """Whether it may be the store that does not answer: what its clients and their libraries
    raise."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (MlflowException, OSError, SQLAlchemyError)) or library in _CLIENTS


def open_experiment(client: MlflowClient, name: str, artifacts: Path, uri: str) -> str:
    """The id of the experiment called `name`, made if it is missing; an embedded store keeps its
    artifacts under `artifacts`."""
    experiment: Experiment | None = client.get_experiment_by_name(name)
    if experiment is None:
        location = None
        if not uri.startswith(("http:", "https:", "databricks")):
            location = artifacts.resolve().as_uri()
        return str(
            client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
        )
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment '{name}' is deleted; restore it, or set tracking.experiment to "
            "another name"
        )
    return str(experiment.experiment_id)


def find_search(client: MlflowClient, search: str | None) -> Run:
    """The parent run of the search called `search`, or of the latest one if None.

    Raises:
        UserError: if there is none.
    """
    if search is not None:
        search = name_in_store(search)
    wanted = "tags.`slimfront.role` = 'search'" + (
        f" AND tags.`slimfront.search` = '{search}'" if search else ""
    )
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments, wanted, max_results=1, order_by=["attributes.start_time DESC"]
    )
    if not runs:
        raise UserError(
            f"there is no search called '{search}' in this store"
            if search
            else "there is no search in this store yet; run `slimfront search CONFIG` first"
        )
    return runs[0]


def run_route(experiment_id: str, run_id: str) -> str:
    """The page of a run behind the address of an MLflow UI, in its model-training mode, whichever
    mode was used last."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def _deepest(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain: `Connection refused` rather than four
    layers around it."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return first_line(error)
