"""Searches recorded by a real MLflow server on PostgreSQL, behind a password, that dies in the
middle."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from slimfront.search.config.schema import Config
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger
from slimfront.search.tracking import compare, recorder
from slimfront.search.tracking.store import run_route
from slimfront.search.tracking.ui import open_ui
from slimfront.trainables.errors import UserError
from tests.conftest import small_config
from tests.search.servers import PASSWORD, Server, basic_auth

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(240)]


class Kills(Progress):
    """Kills the server when two trials have ended; it comes back once the search has noticed."""

    def __init__(self, server: Server, noticed: Callable[[], bool]) -> None:
        self.server = server
        self.noticed = noticed
        self.rescue: threading.Thread | None = None
        self.over = threading.Event()

    def begun(self, search: str, page: str | None) -> None:
        assert page is not None and page.startswith(self.server.url)

    def update(self, ledger: Ledger) -> None:
        if self.rescue is None and len(ledger.with_status("completed")) >= 2:
            self.server.kill()
            self.rescue = threading.Thread(target=self._restart, daemon=True)
            self.rescue.start()

    def _restart(self) -> None:
        while not self.noticed():
            time.sleep(0.1)
        self.server.start(wait=False)
        self.over.wait()  # MLflow's server ends with the thread that started it


def log_in(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong password, which is refused before any trial, and then with the right one."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(
        UserError,
        match=(
            r"the tracking store at http://127.* refuses the user or the password; "
            r"set MLFLOW_TRACK"
        ),
    ):
        run_search(config, name="dies")
    assert not Path(config.search.storage_path).exists()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


@pytest.mark.slow
def test_a_server_with_a_password_that_is_killed_and_restarted_in_the_middle_costs_nothing(
    tmp_path: Path,
    postgres: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(tmp_path, postgres, "--app-name", "basic-auth", **basic_auth(tmp_path))
    server.start()
    try:
        config = small_config(
            tmp_path,
            search={"trials": 6},
            training={"epochs": 6, "batch_size": 64, "report_every": 2},
        )
        config = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"uri": server.url})}
        )
        log_in(config, monkeypatch)
        # The search may be over before the server is up again.
        monkeypatch.setattr(recorder, "_GRACE_S", 300.0)
        caplog.set_level(logging.WARNING)
        kills = Kills(server, lambda: "MLflow did not take a write" in caplog.text)
        result = run_search(config, kills, "dies")
        assert kills.rescue is not None  # it was killed
        assert not result.undelivered
        assert "View run" not in capsys.readouterr().out
        client = MlflowClient(server.url)
        experiment = client.get_experiment_by_name("small")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], max_results=100)
        assert sorted(run.data.tags.get("slimfront.trial", "") for run in runs) == [
            "",
            "dense",
            *(f"trial-{n:03d}" for n in range(6)),
        ]
        for run in runs:
            assert run.info.status == "FINISHED"
            if "slimfront.trial" in run.data.tags:
                assert [
                    m.step for m in client.get_metric_history(run.info.run_id, "epoch/train_loss")
                ] == [1, 2, 3, 4, 5, 6]
                assert [
                    m.step for m in client.get_metric_history(run.info.run_id, "nonzero_params")
                ] == [2, 4, 6]
        (front,) = compare.read_fronts(client, ["dies"])
        assert len(front.members) == len(result.front)
        parent = result.run_ids[""]
        assert [m.step for m in client.get_metric_history(parent, "hypervolume")] == list(
            range(1, 7)
        )
        said: list[str] = []
        open_ui(server.url, "dies", 5000, browser=False, say=said.append)
        assert said == [server.url + run_route(experiment.experiment_id, parent)]
        names = {file.path for file in client.list_artifacts(parent)}
        assert {"front.html", "front.png", "layers.png"} <= names
        written = [
            f
            for f in (tmp_path / "runs").rglob("*")
            if f.is_file() and PASSWORD.encode() in f.read_bytes()
        ]
        assert written == []
        kills.over.set()
    finally:
        server.kill()
