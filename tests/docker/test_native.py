"""The stack of compose.yaml as it runs: its own entry points, commands and health checks, without
containers."""

import base64
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def native() -> Any:
    """docker/native.py; the folder is no package, since one on PyPI has its name."""
    specification = importlib.util.spec_from_file_location("native", ROOT / "docker" / "native.py")
    assert specification is not None and specification.loader is not None
    module = sys.modules["native"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stack() -> Iterator[Any]:
    with native().Stack(workers=1) as stack:
        yield stack


def status(url: str, body: object = None, method: str | None = None, **headers: str) -> int:
    """What a server answers to a request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json"} | headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(stack: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.client_environment()['RAY_AUTH_TOKEN']}"}


def in_database(stack: Any, user: str, database: str, password: str) -> bool:
    """Whether PostgreSQL lets them in."""
    port = stack.port("postgres", 5432)
    try:
        with psycopg.connect(
            host="127.0.0.1", port=port, user=user, dbname=database, password=password
        ):
            return True
    except psycopg.OperationalError as error:
        if re.search("password authentication failed|permission denied", str(error)):
            return False
        raise


def test_mlflow_lets_in_the_right_password_alone_and_only_under_its_own_names(stack: Any) -> None:
    url = stack.url("mlflow", 5000) + "/api/2.0/mlflow/experiments/search?max_results=1"
    right = basic("slimfront", stack.settings["MLFLOW_ADMIN_PASSWORD"])
    assert status(url) == 401
    assert status(url, **basic("slimfront", "wrong" * 4)) == 401
    assert status(url, **right) == 200
    assert status(url, Host="mlflow:5000", **right) == 200
    assert status(url, Host="elsewhere.example", **right) == 403


def test_mlflow_keeps_artifacts_in_its_own_volume(stack: Any) -> None:
    right = basic("slimfront", stack.settings["MLFLOW_ADMIN_PASSWORD"])
    assert (
        status(
            stack.url("mlflow", 5000) + "/api/2.0/mlflow-artifacts/artifacts/0/a.json",
            {},
            "PUT",
            **right,
        )
        == 200
    )
    assert (stack.directory / "artifacts" / "0" / "a.json").read_text() == "{}"


def test_ray_lets_in_nobody_without_its_token(stack: Any) -> None:
    url = stack.url("head", 8265) + "/api/jobs/"
    assert status(url) == 401
    assert status(url, {"entrypoint": "true"}) == 401
    assert status(url, Authorization="Bearer " + "0" * 48) == 403
    assert status(url, **bearer(stack)) == 200


def test_each_role_reaches_its_own_databases_with_its_own_password(stack: Any) -> None:
    optuna, mlflow = stack.settings["OPTUNA_PASSWORD"], stack.settings["MLFLOW_DATABASE_PASSWORD"]
    assert in_database(stack, "slimfront", "optuna", optuna)
    assert in_database(stack, "mlflow", "mlflow", mlflow) and in_database(
        stack, "mlflow", "mlflow_auth", mlflow
    )
    assert not in_database(stack, "slimfront", "optuna", mlflow)
    assert not in_database(stack, "slimfront", "mlflow_auth", optuna)
    assert not in_database(stack, "mlflow", "optuna", mlflow)
    assert not in_database(stack, "postgres", "postgres", optuna)


def test_a_job_has_the_passwords_of_the_head_and_a_worker_has_none(stack: Any) -> None:
    program = (
        "import os; print([n for n in ('PGPASSWORD', "
        "'MLFLOW_TRACKING_PASSWORD') if len(os.environ[n]) >= 16])"
    )
    url, job = stack.url("head", 8265) + "/api/jobs/", "a-job"
    assert (
        status(
            url,
            {"entrypoint": f'{sys.executable} -c "{program}"', "submission_id": job},
            **bearer(stack),
        )
        == 200
    )
    said: dict[str, Any] = {}
    while said.get("status") not in ("SUCCEEDED", "FAILED", "STOPPED"):
        time.sleep(0.2)
        with urllib.request.urlopen(
            urllib.request.Request(url + job, headers=bearer(stack)), timeout=30
        ) as answer:
            said = json.load(answer)
    assert said["status"] == "SUCCEEDED", said
    passwords = {
        value
        for name, value in stack.settings.items()
        if name.endswith("_PASSWORD") and len(value) >= 16
    }
    (worker,) = [process.popen.pid for process in stack.processes if process.name == "worker"]
    nodes = [psutil.Process(worker), *psutil.Process(worker).children(recursive=True)]
    assert len(nodes) > 1
    assert not any(passwords & set(node.environ().values()) for node in nodes)


def test_no_secret_is_on_a_command_line_or_in_what_is_printed(stack: Any) -> None:
    secrets = [stack.settings[name] for name in native().needed_secrets()]
    shown = stack.left_behind() + [stack.log(process.name) for process in stack.processes]
    assert len(shown) > 8
    assert not any(secret in text for secret in secrets for text in shown)


def test_each_node_of_ray_has_a_directory_of_its_own(stack: Any) -> None:
    for name in ("head", "worker"):
        assert list((stack.directory / name).glob("session_*/sockets")), name


def test_nothing_is_written_where_a_container_is_read_only(stack: Any) -> None:
    for name in ("postgres", "mlflow"):  # Ray's nodes have a home of their own in memory
        assert list((stack.directory / "cwd" / name).rglob("*")) == []


def test_secrets_are_rotated_as_the_docs_say(stack: Any) -> None:
    new = "n" * 24
    postgres, mlflow = (
        process for process in stack.processes if process.name in ("postgres", "mlflow")
    )
    here = stack.environment_of(postgres)
    # In a container these are the defaults.
    local = {
        "PGHOST": here["PGDATA"],
        "PGPORT": str(stack.port("postgres", 5432)),
    }
    changed = {name: new for name in here if name.endswith("_PASSWORD")}
    subprocess.run(
        [ROOT / "docker" / "databases.sh"], env=here | local | changed, check=True, timeout=120
    )
    for user, database in (("slimfront", "optuna"), ("mlflow", "mlflow"), ("postgres", "postgres")):
        assert in_database(stack, user, database, new)
    assert not in_database(stack, "slimfront", "optuna", stack.settings["OPTUNA_PASSWORD"])

    url = stack.url("mlflow", 5000) + "/api/2.0/mlflow/experiments/search?max_results=1"
    here = stack.environment_of(mlflow) | {"MLFLOW_AUTH_ADMIN_PASSWORD": new, "PGPASSWORD": new}
    subprocess.run(
        [ROOT / "docker" / "entrypoint.sh", "mlflow-password"], env=here, check=True, timeout=120
    )
    assert status(url, **basic("slimfront", stack.settings["MLFLOW_ADMIN_PASSWORD"])) == 401
    assert status(url, **basic("slimfront", new)) == 200


def test_a_worker_that_dies_is_started_again_and_one_can_be_added(stack: Any) -> None:
    (worker,) = [process for process in stack.processes if process.name == "worker"]
    before = worker.popen.pid
    os.killpg(before, signal.SIGKILL)
    worker.popen.wait()
    assert stack.mend() == ["worker"]
    assert worker.popen.pid != before
    ends = time.monotonic() + 120
    while True:  # on a busy machine Ray gives up its start after 30 s, and is started again
        try:
            stack._await("worker")
            break
        except sys.modules["native"].StackError:
            assert time.monotonic() < ends
            stack.mend()
    assert stack.mend() == []


def add_worker(directory: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "docker" / "native.py"), "--add-worker"],
        env=os.environ | {"SLIMFRONT_STACK": directory},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_worker_is_added_from_the_command_line_to_a_stack_that_runs(stack: Any) -> None:
    asking = add_worker(stack.client_environment()["SLIMFRONT_STACK"])
    ends = time.monotonic() + 200
    while asking.poll() is None:
        assert time.monotonic() < ends
        stack.answer()  # as `wait` does
        time.sleep(0.2)
    said, error = asking.communicate()
    assert (asking.returncode, said, error) == (0, "worker-2 has started.\n", "")
    assert [p.name for p in stack.processes if p.name.startswith("worker")] == [
        "worker",
        "worker-2",
    ]
    assert stack.mend() == []
    assert [*stack.directory.glob("*.answered"), *stack.directory.glob("*.asked")] == []


def test_a_worker_for_a_stack_that_does_not_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for place in ("", str(tmp_path / "gone")):
        said, error = (asking := add_worker(place)).communicate(timeout=60)
        assert (asking.returncode, said) == (2, "")
        assert error.startswith("SLIMFRONT_STACK does not name a stack that runs; ")
        assert error.count("\n") == 1


def test_it_goes_down_without_leaving_a_process(stack: Any) -> None:
    assert len(stack.left_behind()) > 8  # it is seen while it runs
    stack.stop()
    assert stack.left_behind() == []
    assert not stack.directory.exists()
    assert all(process.popen.returncode is not None for process in stack.processes)
    assert os.getpid() not in [process.popen.pid for process in stack.processes]
