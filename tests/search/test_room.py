"""A directory of Ray's that fills up in the middle of a search: one sentence, and the search goes
on when there is room."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from slimfront.search.engine import room
from slimfront.search.engine.ray_internals import local_ray
from slimfront.search.record.events import TrialEnded
from slimfront.search.record.journal import JOURNAL_FILE, read_events
from tests.conftest import SMALL_CONFIG
from tests.search.test_full_disk import Disk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk() -> Iterator[Disk]:
    """One with room for a Ray; its path is short, for there are sockets in it."""
    place = Path(tempfile.mkdtemp(prefix="slimfront-", dir="/tmp"))
    made = Disk(place / "d", "size=60m")
    yield made
    made.close()
    shutil.rmtree(place)


def fill(disk: Disk) -> None:
    with (disk.place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


def ended(directory: Path) -> list[TrialEnded]:
    file = directory / "runs" / "filled" / JOURNAL_FILE
    events = read_events(file) if file.exists() else ()
    return [event for event in events if isinstance(event, TrialEnded)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "killed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["goes-on", "starts-anew"]
)
def test_a_directory_of_ray_s_that_fills_up_ends_the_search_in_one_sentence(
    tmp_path: Path, disk: Disk, *, killed: bool
) -> None:
    """Whether trials go on in their process, or need another one."""
    config = SMALL_CONFIG | {"search": {"trials": 500, "concurrency": 1}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    places = {name: str(disk.place) for name in ("RAY_TMPDIR", "TMPDIR")}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | places
    command = [sys.executable, "-m", "slimfront", "search", "c.yaml", "--name", "filled"]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 150
    while len(ended(tmp_path)) < 2 and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    fill(disk)
    for child in psutil.Process(driver.pid).children(recursive=True) if killed else ():
        with contextlib.suppress(psutil.Error):
            if "ray::CandidateTrainable" in " ".join(child.cmdline()):
                child.kill()
    said = " ".join(driver.communicate(timeout=120)[1].split())
    assert driver.returncode == 2, said
    assert "Error: filled cannot go on: there is no room left in " in said
    assert said.endswith("make room, then `slimfront resume filled`")
    assert "Traceback" not in said
    before = ended(tmp_path)
    assert len(before) >= 2
    assert [event for event in before if event.status == "failed"] == []
    (disk.place / "filler").unlink()
    more = ["resume", "filled", "--set", f"search.trials={len(before) + 1}", "--json"]
    resumed = subprocess.run(
        [sys.executable, "-m", "slimfront", *more],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)
    assert not result["undelivered"]
    assert result["trials"]["completed"] + result["trials"]["stopped"] >= len(before)


def test_no_room_in_ray_s_own_directory_is_told_from_that_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / "disk", "size=2m")
    try:
        monkeypatch.setattr(room, "session_directory", lambda: str(disk.place))
        text = "OSError: [Errno 28] No space left on device: 'x'"
        elsewhere = room.no_room_in(text)
        assert elsewhere is not None and not isinstance(elsewhere, room.NoRoomForRay)
        assert room.no_room_in("ValueError: 28") is None
        fill(disk)
        found = room.no_room_in(text)
        assert isinstance(found, room.NoRoomForRay)
        assert found.filename == str(disk.place)
    finally:
        disk.close()
    assert local_ray.session_directory() == "" or Path(local_ray.session_directory()).is_dir()
