"""Searches as jobs of a real Ray cluster: nodes that come and go, PostgreSQL, and an MLflow server
with a password."""

import contextlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from slimfront.search.cluster.submission import checked, directory_of_factories, staged
from slimfront.search.record.journal import JOURNAL_FILE, Event, read_events
from slimfront.trainables.errors import UserError
from slimfront.trainables.models.factory import Factory
from tests.conftest import SMALL_CONFIG
from tests.search.clusters import RayCluster, free_ports, kill_group, wait_for
from tests.search.servers import PASSWORD, Server, basic_auth

pytestmark = pytest.mark.timeout(500)

EPOCHS = 100


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head of one core whose jobs know the passwords of the database and of MLflow by their
    environment."""
    with RayCluster(
        MLFLOW_TRACKING_USERNAME="anna", MLFLOW_TRACKING_PASSWORD=PASSWORD, PGPASSWORD="secret"
    ) as cluster:
        cluster.add_head()
        yield cluster


def write_config(directory: Path, **changes: Any) -> str:
    """A small config whose results lie below `directory`, as a file."""
    tree = SMALL_CONFIG | {"tracking": {"uri": f"sqlite:///{directory}/slimfront.db"}} | changes
    tree["search"] = {"storage_path": str(directory / "runs")} | tree["search"]
    file = directory / "small.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


@pytest.mark.parametrize(
    ("overrides", "name", "problem"),
    [
        (
            ["search.storage_path=runs"],
            None,
            "'runs' would lie in the directory of the job, which the cluster deletes",
        ),
        (
            ["tracking.uri=sqlite:///a.db"],
            None,
            "set it to an MLflow server, such as http://HOST:5000",
        ),
        (
            ["training.epochs=-1"],
            None,
            "'training.epochs': it should be greater than or equal to 0",
        ),
        ([], "a b", "'a b' cannot name a directory"),
        (
            ["search.storage=postgresql://anna:secret@db/optuna"],
            None,
            "postgresql://anna@db/optuna is given with a password, which everyone who sees the "
            "cluster's jobs could read",
        ),
    ],
)
def test_a_search_that_cannot_be_a_job_is_refused(
    tmp_path: Path, overrides: list[str], name: str | None, problem: str
) -> None:
    with pytest.raises(UserError) as refused:
        checked(Path(write_config(tmp_path)), overrides, name)
    assert problem in str(refused.value)
    assert "secret" not in str(refused.value)


def test_code_travels_without_what_is_not_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "my_nets.py",
        "runs/old/journal.jsonl",
        ".git/config",
        "slimfront.db",
        "pack/data.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    plain = checked(Path(write_config(tmp_path)))
    assert directory_of_factories(plain) is None
    assert (
        directory_of_factories(plain.model_copy(update={"model": Factory(factory="my_nets:small")}))
        == tmp_path
    )
    assert (
        directory_of_factories(
            plain.model_copy(update={"model": Factory(factory="installed.nets:small")})
        )
        is None
    )
    with staged(tmp_path, {"search.yaml": "name: x"}) as directory:
        sent = {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}
    assert sent == {"my_nets.py", "pack/data.py", "search.yaml", "small.yaml"}
    with (
        pytest.raises(UserError, match=r"--working-dir nowhere: there is no such directory"),
        staged(Path("nowhere"), {}),
    ):
        pass


@pytest.mark.slow
def test_what_only_the_cluster_can_know_is_refused_there_and_said_here(
    cluster: RayCluster, tmp_path: Path
) -> None:
    for words, problem in (
        (
            [
                *("submit", write_config(tmp_path), "--name", "big"),
                *("--set", "resources.cpu=2", "--set", "search.concurrency=auto"),
            ],
            "ended before the search began: resources.cpu: a trial asks for 2 CPU, and there is 1 "
            "here; set res",
        ),
        (["status", "nothing"], "has no search 'nothing'; known: big"),
        (
            ["submit", "--resume", "nothing"],
            "this cluster has had no job of the search 'nothing' (it has had: big)",
        ),
        (["submit", "--name", "x"], "say what to submit: a config, or --resume SEARCH"),
    ):
        refused = cluster.run(*words, "--address", cluster.jobs)
        assert refused.returncode == 2
        assert problem in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_its_token_a_cluster_lets_nobody_in(cluster: RayCluster) -> None:
    refused = cluster.run("list", "--address", cluster.jobs, RAY_AUTH_TOKEN="0" * 64)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    assert (
        "does not let you in; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to its token"
        in refused.stderr
    )


@pytest.mark.slow
def test_an_address_where_no_cluster_is_is_refused_at_once(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (port,), config = free_ports(1), write_config(tmp_path)
    for words, problem in (
        (
            ["list", "--address", f"http://127.0.0.1:{port}"],
            f"no Ray cluster answers at http://127.0.0.1:{port}",
        ),
        (
            ["list", "--address", f"127.0.0.1:{port}"],
            "the jobs of a cluster are at its dashboard, such as http://HEAD:8265",
        ),
        (["search", config, "--address", f"127.0.0.1:{port}"], "no Ray cluster can be joined at"),
    ):
        refused = cluster.run(*words)
        (error,) = [line for line in refused.stderr.splitlines() if line.startswith("Error")]
        assert (refused.returncode, problem in error) == (2, True)
        assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_ray_client_runs_the_driver_on_the_head_with_code_from_here(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (cluster.work / "my_nets.py").write_text(
        "from torch import nn\n\n\ndef small():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
    )
    config = write_config(
        tmp_path, model={"name": "factory", "factory": "my_nets:small"}, search={"trials": 2}
    )
    config_text = yaml.safe_load(Path(config).read_text())
    del config_text["penalties"], config_text["space"]["penalties.layer.strength"]
    Path(config).write_text(yaml.safe_dump(config_text))
    done = cluster.run(
        "search",
        config,
        "--address",
        f"ray://127.0.0.1:{cluster.client}",
        "--name",
        "remote",
        "--json",
        seconds=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == {
        "completed": 2,
        "stopped": 0,
        "failed": 0,
        "repeated": 0,
    }
    assert "The search remote has begun" in done.stderr
    taken = cluster.run(
        "search", config, "--address", f"ray://127.0.0.1:{cluster.client}", "--name", "remote"
    )
    assert taken.returncode == 2
    assert "there is a search 'remote' already" in taken.stderr


@pytest.mark.slow
def test_an_autoscaler_makes_room_for_the_trials_that_are_asked_for(tmp_path: Path) -> None:
    with RayCluster(RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1") as cluster:
        head = cluster.add_autoscaling_head(most=2)
        at = ["--address", f"127.0.0.1:{cluster.port}", "--json"]
        config = write_config(tmp_path, search={"trials": 4, "concurrency": 2})
        done = cluster.run("search", config, *at)
        assert done.returncode == 0, done.stderr
        assert "no node has the resources of a trial (1 CPU) yet; trials wait for one" in " ".join(
            done.stderr.split()
        )
        assert json.loads(done.stdout)["trials"]["completed"] == 4
        processes = psutil.Process(head.pid).children(recursive=True)
        assert sum(Path(process.exe()).name == "raylet" for process in processes) == 3


@pytest.mark.slow
def test_a_search_survives_lost_nodes_a_stop_and_a_new_head(
    cluster: RayCluster,
    tmp_path: Path,
    postgres: str,
    postgres_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    postgres_server.psql("create database tracked owner anna")
    tracked = re.sub(r"/test_\w+", "/tracked", postgres)
    server = Server(tmp_path, tracked, "--app-name", "basic-auth", **basic_auth(tmp_path))
    server.start()
    try:
        config = write_config(
            tmp_path,
            training={"epochs": EPOCHS, "batch_size": 16, "report_every": 10},
            search={
                "trials": 500,
                "storage": postgres.replace(":secret@", "@"),
            },  # more than can end before it is stopped
            resources={"pack": 1},
            tracking={"uri": server.url},
        )
        at = ["--address", cluster.jobs]
        second = cluster.add_node()
        submitted = cluster.run("submit", config, "--name", "e2e", *at)
        assert submitted.returncode == 0, submitted.stderr + submitted.stdout
        link = re.search(r"The search e2e has begun; watch it at (\S+)", submitted.stdout)
        assert link is not None and link[1].startswith(f"{server.url}/#/experiments/")

        wait_for(lambda: len(events(tmp_path, "ended")) >= 2, 120)
        wait_for(lambda: trains(second), 120)
        kill_group(second)  # a node is lost in the middle
        third = cluster.add_node()
        wait_for(lambda: trains(third), 120)
        wait_for(
            lambda: (
                " lost its process " in " ".join(cluster.run("logs", "e2e", *at).stdout.split())
            ),
            120,
        )

        stopped = cluster.run("stop", "e2e", *at)
        assert stopped.returncode == 0 and "e2e: stopped" in stopped.stdout, stopped.stderr
        listed = json.loads(cluster.run("list", "--json", *at).stdout)
        assert [job["status"] for job in listed if job["search"] == "e2e"] == ["STOPPED"]
        status = json.loads(cluster.run("status", "e2e", "--json", *at).stdout)
        assert status["job"] == "e2e"
        # What it did last, when it was stopped: trials, or what comes after them.
        assert re.search("/500 trials, |Writing the rest to MLflow", status["progress"])

        ended = len(events(tmp_path, "ended"))
        again = cluster.run("submit", "--resume", "e2e", "--no-wait", *at)
        assert again.returncode == 0 and "as job e2e-2" in again.stdout, again.stderr
        wait_for(lambda: len(events(tmp_path, "ended")) > ended, 120)
        for node in (cluster.nodes[0], third):
            kill_group(node)
        cluster.add_head()
        cluster.add_node()
        unknown = cluster.run("submit", "--resume", "e2e", *at)
        assert (
            unknown.returncode == 2
            and "say with --storage-path where the search is kept" in unknown.stderr
        )
        trials = len(optuna.load_study(study_name="e2e", storage=postgres).trials) + 2
        fewer = ["--storage-path", str(tmp_path / "runs"), "--set", f"search.trials={trials}"]
        last = cluster.run("submit", "--resume", "e2e", *fewer, *at)
        assert last.returncode == 0, last.stderr
        followed = cluster.run("logs", "e2e", "--follow", *at, seconds=200)
        assert followed.returncode == 0, followed.stdout
        assert "Front of e2e" in followed.stdout

        for number in range(trials):
            trained = [
                e["epoch"]
                for event in events(tmp_path, "epochs")
                if event.number == number
                for e in event.history
            ]
            assert trained == list(range(1, EPOCHS + 1))  # nothing twice, nothing left out
        ends = Counter(
            event.number for event in events(tmp_path, "ended") if event.status == "completed"
        )
        assert ends == {None: 1} | dict.fromkeys(range(trials), 1)
        study = optuna.load_study(study_name="e2e", storage=postgres)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * trials
        client = MlflowClient(server.url)
        experiment = client.get_experiment_by_name("small")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], max_results=100)
        labels = sorted(run.data.tags.get("slimfront.trial", "") for run in runs)
        assert labels == ["", "dense", *(f"trial-{n:03d}" for n in range(trials))]
        assert {run.info.status for run in runs} == {"FINISHED"}
        written = [
            f for f in (tmp_path / "runs").rglob("*") if f.is_file() and b"secret" in f.read_bytes()
        ]
        assert written == []
    finally:
        server.kill()


def events(directory: Path, kind: str) -> list[Event]:
    file = directory / "runs" / "e2e" / JOURNAL_FILE
    return [event for event in read_events(file) if event.kind == kind] if file.exists() else []


def trains(node: subprocess.Popen[str]) -> bool:
    """Whether a trial trains in one of a node's processes at this moment."""
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "ray::CandidateTrainable.train" in " ".join(process.cmdline()):
                return True
    return False
