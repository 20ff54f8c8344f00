"""Stores that cannot be written to, and what only looks like one."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slimfront.search.config.space import flatten
from slimfront.search.tracking.store import connect
from slimfront.search.tracking.write_queue import param
from slimfront.trainables.errors import UserError


class Answer(BaseHTTPRequestHandler):
    body = b"{}"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(
    params=[
        b"{}",
        b"<html>log in</html>",
        json.dumps({"experiment": {"experiment_id": "3", "name": "x"}}).encode(),
    ]
)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Answers everything alike, with status 200."""
    handler = type("Fixed", (Answer,), {"body": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_what_answers_everything_alike_is_no_mlflow_server(server: str) -> None:
    with pytest.raises(UserError, match=r"is no MLflow server|does not answer") as refused:
        connect(server, writes=True)
    assert len(str(refused.value)) < 480


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with a store, on a file system that was made read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    connect(f"sqlite:///{tmp_path}/there.db", writes=True)
    shutil.copy(tmp_path / "there.db", place)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_store_that_cannot_be_written_to_is_refused_at_once_and_can_be_read(
    read_only: Path,
) -> None:
    begun = time.monotonic()
    for name in ("new.db", "there.db", "nowhere/new.db"):
        with pytest.raises(UserError, match="cannot be written to"):
            connect(f"sqlite:///{read_only}/{name}", writes=True)
    with pytest.raises(UserError, match="cannot be written to"):
        connect(f"sqlite:///{read_only}/new.db")
    assert time.monotonic() - begun < 5
    assert connect(f"sqlite:///{read_only}/there.db").search_experiments()


def test_a_key_with_dots_is_a_name_that_mlflow_takes(tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/params.db", writes=True)
    run = client.create_run("0").info.run_id
    (path,) = flatten({"space": {'penalties.node.layers["a.0"]': {"low": 0.5}}})
    client.log_batch(run, params=[param(path, 0.5)])
    ((name, value),) = client.get_run(run).data.params.items()
    assert (name, value) == ("space.penalties.node.layers.a.0.low", "0.5")
