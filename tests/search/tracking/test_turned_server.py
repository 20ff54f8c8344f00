"""An MLflow server in whose place something else answers in the middle of a search."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from slimfront.search.config.schema import Config
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search, sync_search
from slimfront.search.record.ledger import Ledger
from slimfront.search.tracking import recorder, write_queue
from slimfront.search.tracking.store import connect
from tests.conftest import small_config
from tests.search.servers import Server
from tests.search.tracking.test_recorder import check_story, record, story

pytestmark = pytest.mark.timeout(300)


class Answer(BaseHTTPRequestHandler):
    """One answer to whatever is asked."""

    status, body = 200, b"{}"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Turning:
    """An MLflow server, and what answers in its place after `turn`."""

    def __init__(self, directory: Path) -> None:
        self.server = Server(directory, f"sqlite:///{directory}/server.db")
        self.server.start()
        self.other: ThreadingHTTPServer | None = None

    def turn(self, status: int = 200, body: bytes = b"{}") -> None:
        handler = type("Fixed", (Answer,), {"status": status, "body": body})
        self.server.kill()
        ends = time.monotonic() + 20
        while self.other is None:
            try:
                self.other = ThreadingHTTPServer(("127.0.0.1", self.server.port), handler)
            except OSError:  # its workers are about to end
                assert time.monotonic() < ends
                time.sleep(0.1)
        threading.Thread(target=self.other.serve_forever, daemon=True).start()

    def back(self) -> None:
        """Puts the server back in its place."""
        self.end()
        self.server.start()

    def end(self) -> None:
        self.server.kill()
        if self.other is not None:
            self.other.shutdown()
            self.other.server_close()
            self.other = None


@pytest.fixture
def turning(tmp_path: Path) -> Iterator[Turning]:
    made = Turning(tmp_path)
    yield made
    made.end()


def on(server: Server, config: Config) -> Config:
    tracking = config.tracking.model_copy(update={"uri": server.url})
    return config.model_copy(update={"tracking": tracking})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"{}"),
        (200, b"<html>log in</html>"),
        (400, b"<html>not here</html>"),
    ],
    ids=["empty", "page", "refusal"],
)
def test_what_is_no_mlflow_any_more_takes_and_refuses_nothing(
    turning: Turning,
    tmp_path: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
) -> None:
    monkeypatch.setattr(recorder, "_GRACE_S", 1.0)
    monkeypatch.setattr(recorder, "_PATIENCE_S", (0.1, 0.3))
    monkeypatch.setattr(write_queue, "_COLLECT_S", 0.0)
    config, events, directory = on(turning.server, config), story(trials=2), tmp_path / "search-1"
    made = record(connect(config.tracking.uri), config, directory, events[:3])
    ends = time.monotonic() + 60
    while made.delivered < 3:
        assert time.monotonic() < ends
        time.sleep(0.05)
    turning.turn(status, body)
    for event in events[3:]:
        made.take(event)
        time.sleep(0.6)
    assert not made.close()
    assert made.delivered == 3
    turning.back()
    client = connect(config.tracking.uri)
    again = record(client, config, directory, events, len(events))
    assert again.close()
    assert again.refused == []
    check_story(client, trials=2)


class Turns(Progress):
    """Turns the server when two trials have ended, and another has reported."""

    def __init__(self, turning: Turning) -> None:
        self.turning = turning

    def update(self, ledger: Ledger) -> None:
        reported = any(record.points for record in ledger.with_status("running"))
        if self.turning.other is None and len(ledger.with_status("completed")) >= 2 and reported:
            self.turning.turn()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_whose_server_turns_says_what_is_missing_and_sync_brings_it(
    turning: Turning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_GRACE_S", 3.0)
    training = {"epochs": 4, "batch_size": 64, "report_every": 1}
    config = small_config(tmp_path, search={"trials": 6, "concurrency": 1}, training=training)
    result = run_search(on(turning.server, config), Turns(turning), "turns")
    assert turning.other is not None
    assert len(result.ledger.with_status("completed")) == 6
    assert result.undelivered
    turning.back()
    assert sync_search("turns", str(tmp_path / "runs")) == (True, [])
    client = MlflowClient(turning.server.url)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert sorted(run.data.tags.get("slimfront.trial", "") for run in runs) == [
        "",
        "dense",
        *(f"trial-{n:03d}" for n in range(6)),
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if "slimfront.trial" in run.data.tags:
            assert "seed" in run.data.params
            history = client.get_metric_history(run.info.run_id, "epoch/train_loss")
            assert [point.step for point in history] == [1, 2, 3, 4]
    names = {file.path for file in client.list_artifacts(result.run_ids[""])}
    assert {"config.yaml", "front.html", "front.png", "layers.png"} <= names
    models = client.search_logged_models([experiment.experiment_id])
    assert len(models) == len(result.front)
