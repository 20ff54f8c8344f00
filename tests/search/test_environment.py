"""What the environment says is heard, and what it should not touch is left alone."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from slimfront.search.cli.shell import spare_loopback
from slimfront.search.config.loading import load
from slimfront.search.config.schema import Config
from slimfront.search.record.session import begin, open_existing
from slimfront.search.tracking.ui import _wait_until_up
from tests.conftest import SMALL_CONFIG
from tests.search.test_cli import slimfront

ROOT = Path(__file__).parents[2]
FACTORY = (
    "from torch import nn\n\ndef network(width):\n    return "
    "nn.Sequential(nn.Flatten(), nn.Linear(64, width), "
)
FACTORY += "nn.Linear(width, 10))\n"


def test_the_store_of_the_environment_is_used_and_said(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    assert load(config_file).tracking.uri == "http://me:hunter2@host:5000"
    code, out, err = slimfront(capsys, monkeypatch, "check", "--no-stores", str(config_file))
    assert code == 0
    assert yaml.safe_load(out)["tracking"]["uri"] == "http://me@host:5000"
    assert err == (
        "tracking.uri is not in the config: it is http://me@host:5000, from MLFLOW_TRACKING_URI\n"
    )

    code, out, err = slimfront(
        capsys, monkeypatch, "check", str(config_file), "--set", "tracking.uri=sqlite:///mine.db"
    )
    assert (yaml.safe_load(out)["tracking"]["uri"], err) == ("sqlite:///mine.db", "")


def test_without_either_the_store_is_a_file_here(config_file: Path) -> None:
    assert load(config_file).tracking.uri == "sqlite:///slimfront.db"


def test_the_environment_gives_the_password_of_a_store_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    begin(Config.model_validate(SMALL_CONFIG), "mine", {}, []).journal.close()
    for uri, expected in (
        ("http://me:hunter2@host:5000", "http://me:hunter2@host:5000"),
        ("http://elsewhere", "http://me@host:5000"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        session = open_existing("mine", "runs")
        session.journal.close()
        assert session.config.tracking.uri == expected


def test_commands_that_read_a_store_read_that_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for command in (["ui", "--no-browser"], ["front", "mine"], ["register", "mine", "--name", "m"]):
        code, _, err = slimfront(capsys, monkeypatch, *command)
        assert code == 2
        assert "the tracking store at http://127.0.0.1:9 does not answer" in err


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"
            )
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("slimfront.search.tracking.ui._START_TIMEOUT_S", 5.0)
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as running:
            try:
                _wait_until_up(running, f"http://127.0.0.1:{server.getsockname()[1]}")
            finally:
                running.kill()


def test_loopback_joins_what_no_proxy_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "intra.net,localhost")
    monkeypatch.delenv("NO_PROXY", raising=False)
    spare_loopback()
    assert os.environ["no_proxy"] == "intra.net,localhost,127.0.0.1,::1"
    assert os.environ["NO_PROXY"] == "localhost,127.0.0.1,::1"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_module_beside_the_config_is_found_from_any_directory(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "made_here.py").write_text(FACTORY)
    space = {
        "model.args.width": {"low": 4, "high": 8},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    }
    model = {"factory": "made_here:network", "args": {"width": 4}}
    config = SMALL_CONFIG | {
        "model": model,
        "space": space,
        "search": {"trials": 2, "concurrency": 1},
        "penalties": {},
    }
    (project / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "slimfront", "search", "../project/c.yaml", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=elsewhere, timeout=140, env=environment
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["trials"]["completed"] == 2

    # What reads the search afterwards finds them too.
    command = [sys.executable, "-m", "slimfront", "export", told["search"], "--output", "small.pt2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=elsewhere, timeout=140, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "small.pt2").exists()
