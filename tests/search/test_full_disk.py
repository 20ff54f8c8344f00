"""A disk that is really full: a small file system of the test's own."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import resume_search, run_search, sync_search
from slimfront.search.record.events import EpochsReported, TrialContinued
from slimfront.search.record.journal import JOURNAL_FILE, Journal, read_events
from slimfront.search.tracking import models, recorder
from slimfront.search.tracking.store import connect
from slimfront.trainables.errors import UserError
from tests.conftest import small_config


class Disk:
    """A file system in memory; skips the test where this user may not mount one."""

    def __init__(self, place: Path, limit: str) -> None:
        self.place, self.limit = place, limit
        place.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip("this user may not mount a file system")

    def grow(self) -> None:
        """Makes room."""
        subprocess.run(
            ["mount", "-o", "remount,size=500m,nr_inodes=100000", str(self.place)], check=True
        )

    def close(self) -> None:
        """Takes it away."""
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


@pytest.fixture(params=["size=3m", pytest.param("size=100m,nr_inodes=50", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """One with room for a few checkpoints, or for a few files."""
    made = Disk(tmp_path / "disk", request.param)
    yield made
    made.close()


def on(disk: Disk, tmp_path: Path, **changes: Any) -> Config:
    config = small_config(
        tmp_path,
        model={"name": "mlp", "depth": 2, "width": 128},
        one_shot={"steps": 8},
        search={"trials": 6, "concurrency": 2},
        **changes,
    )
    kept = config.search.model_copy(update={"storage_path": str(disk.place / "runs")})
    return config.model_copy(update={"search": kept})


def events(disk: Disk) -> list[dict[str, Any]]:
    return list(read_events(disk.place / "runs" / "full" / JOURNAL_FILE))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(240)
def test_a_search_whose_disk_is_full_ends_in_one_sentence_and_goes_on_when_there_is_room(
    disk: Disk, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"full cannot be kept in .*/runs/full \(.*\).*make room, then "
            r"`slimfront resume full`"
        ),
    ) as caught:
        run_search(on(disk, tmp_path), name="full")
    assert "\n" not in str(caught.value)
    before = events(disk)
    assert not [event for event in before if event.kind == "ended" and event.status == "failed"]
    disk.grow()
    result = resume_search("full", storage_path=str(disk.place / "runs"))
    assert len(result.ledger.with_status("completed")) == 6
    assert events(disk)[: len(before)] == before


@pytest.mark.parametrize("limit", ["size=64k", "size=128k"])
def test_a_journal_has_whole_lines_only_however_full_its_disk_is(
    tmp_path: Path, limit: str
) -> None:
    disk = Disk(tmp_path / "disk", limit)
    try:
        journal = Journal(disk.place)
        written = []

        def fill() -> None:
            while True:
                written.append(
                    journal.append(
                        EpochsReported(number=len(written), history=[{"text": "x" * 1000}])
                    )
                )

        with pytest.raises(OSError, match="No space left on device"):
            fill()
        journal.close()
        assert list(read_events(disk.place / JOURNAL_FILE)) == written
        disk.grow()
        again = Journal(disk.place)
        written.append(again.append(TrialContinued(number=-1)))
        again.close()
        assert list(read_events(disk.place / JOURNAL_FILE)) == written
    finally:
        disk.close()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store of MLflow's in SQLite."""
    file = tmp_path_factory.mktemp("store") / "empty.db"
    connect(f"sqlite:///{file}", writes=True)
    return file


def tracked_on(disk: Disk, directory: Path, store: Path) -> Config:
    """A config whose tracking store, and the artifacts of it, lie on a disk; the rest does not."""
    shutil.copy(store, disk.place / "slimfront.db")
    (disk.place / "artifacts").mkdir()
    (directory / "runs").mkdir()
    (directory / "runs" / "artifacts").symlink_to(disk.place / "artifacts")
    config = small_config(directory, search={"trials": 6, "concurrency": 2})
    tracking = config.tracking.model_copy(
        update={"uri": f"sqlite:///{disk.place}/slimfront.db", "experiment": "full"}
    )
    return config.model_copy(update={"tracking": tracking})


@pytest.fixture(params=[100, pytest.param(600, marks=pytest.mark.slow)])
def tracking_disk(
    request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path
) -> Iterator[Disk]:
    """One with room for a new store, and for a few trials in it; or for a few artifacts, too."""
    kb = empty_store.stat().st_size // 1024 + request.param
    made = Disk(tmp_path / "disk", f"size={kb}k")
    yield made
    made.close()


def check_all_is_delivered(config: Config, result: Any) -> None:
    """Every trial and all of its epochs, the page of the search, and a model of each member."""
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment or config.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 8
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if "slimfront.trial" in run.data.tags:
            history = client.get_metric_history(run.info.run_id, "epoch/train_loss")
            assert [point.step for point in history] == [1, 2]
    (parent,) = [run for run in runs if run.data.tags["slimfront.role"] == "search"]
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "front.html", "front.json", "front.png", "layers.png"} <= names
    made = client.search_logged_models([experiment.experiment_id])
    members = [models.model_name(p.trial.label, p.epoch, p.step) for p in result.front]
    assert sorted(str(model.name) for model in made) == sorted(members)
    assert {str(model.status) for model in made} == {"READY"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(300)
def test_a_tracking_store_on_a_full_disk_costs_nothing_and_gets_all_when_there_is_room(
    tracking_disk: Disk,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recorder, "_GRACE_S", 5.0)
    config = tracked_on(tracking_disk, tmp_path, empty_store)
    result = run_search(config, name="full")
    assert result.undelivered
    assert len(result.ledger.with_status("completed")) == 6
    assert caplog.text.count("MLflow did not take a write") == 1
    try:
        complete, _ = sync_search("full", str(tmp_path / "runs"))
    except UserError as error:  # there is not even room to try
        assert "database or disk is full" in str(error)  # noqa: PT017
    else:
        assert not complete
    tracking_disk.grow()
    assert sync_search("full", str(tmp_path / "runs")) == (True, [])
    check_all_is_delivered(config, result)
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(240)
def test_a_tracking_store_without_room_for_the_first_run_is_one_sentence_with_what_goes_on(
    tmp_path: Path, empty_store: Path
) -> None:
    disk = Disk(tmp_path / "disk", f"size={empty_store.stat().st_size // 1024 + 24}k")
    try:
        config = tracked_on(disk, tmp_path, empty_store)
        told = r"does not take what is written \(database or disk is full\); .* `slimfront {}`$"
        with pytest.raises(UserError, match=told.format("resume full")):
            run_search(config, name="full")
        with pytest.raises(UserError, match=told.format("sync full")):
            sync_search("full", str(tmp_path / "runs"))
        disk.grow()
        result = resume_search("full", storage_path=str(tmp_path / "runs"))
        assert not result.undelivered
        check_all_is_delivered(config, result)
    finally:
        disk.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", [300, pytest.param(900, marks=pytest.mark.slow)])
def test_a_search_and_its_tracking_store_on_one_full_disk_lose_nothing(
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    room: int,
) -> None:
    monkeypatch.setattr(recorder, "_GRACE_S", 3.0)
    disk = Disk(tmp_path / "disk", f"size={empty_store.stat().st_size // 1024 + room}k")
    try:
        shutil.copy(empty_store, disk.place / "slimfront.db")
        config = small_config(disk.place, search={"trials": 6, "concurrency": 2})
        try:
            # The journal may have had room for all, and MLflow for nothing.
            assert run_search(config, name="full").undelivered
        except UserError as error:
            assert str(error).endswith("make room, then `slimfront resume full`")  # noqa: PT017
        before = events(disk)
        assert not [event for event in before if event.kind == "ended" and event.status == "failed"]
        disk.grow()
        result = resume_search("full", storage_path=str(disk.place / "runs"))
        assert events(disk)[: len(before)] == before
        assert not result.undelivered
        assert len(result.ledger.with_status("completed")) == 6
        check_all_is_delivered(config, result)
        assert "Traceback" not in "".join(capfd.readouterr())
    finally:
        disk.close()
