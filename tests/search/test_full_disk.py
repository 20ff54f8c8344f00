"""A disk that is really full: a small file system of the test's own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record.events import EpochsReported, TrialContinued
from slimfront.search.record.journal import JOURNAL_FILE, Journal, read_events
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
        search={"trials": 6, "concurrency": 2},
        **changes,
    )
    kept = config.search.model_copy(update={"storage_path": str(disk.place / "runs")})
    return config.model_copy(update={"search": kept})


def events(disk: Disk) -> list[dict[str, Any]]:
    return list(read_events(disk.place / "runs" / "full" / JOURNAL_FILE))


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
