import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from slimfront.search.config.schema import Config
from slimfront.search.record.events import SearchBegan, SessionEnded
from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.store import connect
from slimfront.search.tracking.ui import open_ui
from slimfront.trainables.errors import UserError


@pytest.fixture
def recorded(config: Config, tmp_path: Path) -> str:
    """The tracking URI of a store with one search, called `one`, that has no trials."""
    return record_one(config, config.tracking.uri, tmp_path)


def record_one(config: Config, uri: str, tmp_path: Path) -> str:
    """Records the search `one` there."""
    (tmp_path / "one").mkdir()
    recorder = Recorder(connect(uri), config, "one", tmp_path / "one")
    recorder.take(SearchBegan(time=1, search="one", dense_sizes={"nonzero_params": 3}))
    recorder.take(SessionEnded(time=2, status="completed", seconds=1.0))
    assert recorder.close()
    return uri


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_page(uri: str) -> None:
    """`slimfront ui` serves MLflow at the search, shows no password, and takes the server with
    it."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("slimfront")),
        "ui",
        "--tracking-uri",
        uri,
        "--port",
        str(port),
    ]
    with subprocess.Popen(
        [*command, "--no-browser"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ui:
        try:
            assert ui.stdout is not None
            line = ui.stdout.readline()
            page = re.fullmatch(
                rf"(http://127\.0\.0\.1:{port})/#/experiments/\d+/runs/(\w+)\?workflowType=machine_learning\n",
                line,
            )
            assert page is not None, line
            api = f"{page[1]}/api/2.0/mlflow/runs/get?run_id={page[2]}"
            assert '"one"' in urllib.request.urlopen(api, timeout=10).read().decode()
            servers = psutil.Process(ui.pid).children(recursive=True)
            assert servers
            assert not any("secret" in word for server in servers for word in server.cmdline())
        finally:
            ui.send_signal(signal.SIGTERM)
            ui.wait(timeout=30)
    with pytest.raises(OSError, match="refused"):  # the server has ended too
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.mark.timeout(120)
def test_ui_serves_mlflow_and_prints_the_page_of_the_search(recorded: str) -> None:
    check_page(recorded)


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_ui_serves_a_postgresql_store_and_keeps_its_password_off_command_lines(
    config: Config, postgres: str, tmp_path: Path
) -> None:
    check_page(record_one(config, postgres, tmp_path))


def test_a_taken_port_is_refused(recorded: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port} is taken; choose another one with --port"
        ):
            open_ui(recorded, None, port, browser=False, say=print)


def test_an_unknown_search_is_refused(recorded: str) -> None:
    with pytest.raises(UserError, match="there is no search called 'two' in this store"):
        open_ui(recorded, "two", free_port(), browser=False, say=print)
