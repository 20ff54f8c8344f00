"""Searches kept in the bucket of a real S3-compatible server."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record import fencing, storage
from slimfront.search.record.events import EpochsReported, SessionBegan, TrialContinued
from slimfront.search.record.export import export
from slimfront.search.record.fencing import Fence, Superseded
from slimfront.search.record.journal import JOURNAL_FILE, Journal, present, read_events
from slimfront.search.record.storage import Mirror, Storage, delete, fetch, join, parent
from slimfront.trainables.errors import UserError
from tests.conftest import small_config
from tests.search.clusters import free_ports


@contextlib.contextmanager
def s3_server(port: int = 0) -> Iterator[str]:
    """An S3 server; HOST:PORT. What it has stays in this process when it ends."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"{host}:{port}"
    moto.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server for the module."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URI of a folder in a new bucket, with this machine's copies in a directory of the
    test's."""
    return new_bucket(server, monkeypatch, tmp_path)


def new_bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in (
        ("ACCESS_KEY_ID", "anna"),
        ("SECRET_ACCESS_KEY", "secret"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "machine"))
    (tmp_path / "machine").mkdir()
    name = f"b{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=f"http://{server}").create_bucket(Bucket=name)
    return f"s3://{name}/searches?endpoint_override={server}&scheme=http"


def another_machine(tmp_path: Path) -> None:
    """From here on nothing is left of what this machine kept."""
    shutil.rmtree(tmp_path / "machine")
    (tmp_path / "machine").mkdir()


@pytest.mark.parametrize(
    ("place", "joined"),
    [
        ("/runs", "/runs/one/checkpoint_1"),
        ("s3://b/runs", "s3://b/runs/one/checkpoint_1"),
        ("s3://b/runs/?scheme=http", "s3://b/runs/one/checkpoint_1?scheme=http"),
    ],
)
def test_paths_are_joined_before_the_query_of_a_uri(place: str, joined: str) -> None:
    assert join(place, "one/checkpoint_1") == joined
    assert parent(parent(joined)) == place.replace("/?", "?")


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A database that says who has a search."""
    return f"sqlite:///{tmp_path}/drivers.db"


def journal_of(uri: str, database: str) -> Journal:
    folder = Storage(uri).make("one")
    return Journal(folder.local, folder.mirror(database))


def test_a_journal_in_a_bucket_is_read_on_another_machine(
    bucket: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SEGMENT_BYTES", 200)
    journal = journal_of(bucket, database)
    written = [journal.append(TrialContinued(number=number)) for number in range(20)]
    # Waits for the next event, and is lost with the machine.
    journal.append(EpochsReported(number=20, history=[]))
    another_machine(tmp_path)
    folder = Storage(bucket).folder("one")
    assert present(folder)
    assert list(read_events(folder.local / JOURNAL_FILE)) == written
    files, root = fs.FileSystem.from_uri(bucket)
    assert len(files.get_file_info(fs.FileSelector(f"{root}/one/journal"))) > 3
    journal.close()
    again = Journal(folder.local, folder.mirror(database))
    written += [
        again.append(EpochsReported(number=21, history=[])),
        again.append(TrialContinued(number=21)),
    ]
    another_machine(tmp_path)
    assert present(folder)
    assert list(read_events(folder.local / JOURNAL_FILE)) == written
    again.close()


def test_one_driver_at_a_time_and_another_when_it_is_lost(
    bucket: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 1.5)
    first = journal_of(bucket, database)
    first.append(SessionBegan(session=1))
    another_machine(tmp_path)
    folder = Storage(bucket).folder("one")
    folder.local.mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"is running in another process \(.*process \d+.*\); wait for its end, or end it",
    ):
        Journal(folder.local, folder.mirror(database))
    assert first.fence is not None and first.fence.keeper is not None
    first.fence.closing.set()  # it does nothing any more, as if its machine were gone
    first.fence.keeper.join()
    second = Journal(folder.local, folder.mirror(database))
    second.append(TrialContinued(number=2))
    with pytest.raises(Superseded, match="another process has taken over one"):
        first.append(TrialContinued(number=3))
    second.append(TrialContinued(number=4))
    assert present(folder)
    assert [
        getattr(event, "number", None) for event in read_events(folder.local / JOURNAL_FILE)
    ] == [
        None,
        2,
        4,
    ]
    second.close()
    Journal(folder.local, folder.mirror(database)).close()  # one that was closed lets go at once


def test_what_a_superseded_driver_writes_is_not_read_whatever_it_does(
    bucket: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 0.5)
    first = journal_of(bucket, database)
    first.append(SessionBegan(session=1))
    assert first.fence is not None and first.mirror is not None and first.fence.keeper is not None
    first.fence.closing.set()
    first.fence.keeper.join()
    folder = Storage(bucket).folder("one")
    second = folder.mirror(database)
    assert second is not None
    second.take()
    second.pull(tmp_path / "there")
    # It looked just before, and then stood still.
    monkeypatch.setattr(first.fence, "check", lambda: None)
    first.mirror.push(b'{"event": "continued", "number": 1}\n')
    monkeypatch.setattr(storage, "SEGMENT_BYTES", 1)
    first.mirror.push(b'{"event": "continued", "number": 2}\n')
    first.mirror.push(b'{"event": "continued", "number": 3}\n')
    second.push(b'{"event": "continued", "number": 4}\n')
    third = folder.mirror()
    assert third is not None
    third.pull(tmp_path / "read")
    assert [getattr(event, "number", None) for event in read_events(tmp_path / "read")] == [None, 4]
    second.release()


def test_checkpoints_are_fetched_once_and_deleted(bucket: str) -> None:
    files, root = fs.FileSystem.from_uri(bucket)
    with files.open_output_stream(f"{root}/one/c/network.pt") as stream:
        stream.write(b"tensors")
    folder = join(bucket, "one/c")
    assert fetch(folder, "network.pt").read_bytes() == b"tensors"
    files.delete_file(f"{root}/one/c/network.pt")
    assert fetch(folder, "network.pt").read_bytes() == b"tensors"
    delete(folder)
    with pytest.raises(UserError, match=r"network\.pt of s3://b\d+/searches/one/c cannot be read"):
        fetch(folder, "network.pt")
    delete(folder)  # gone already


def test_a_bucket_that_is_away_for_a_while_is_waited_for(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (port,) = free_ports(1)
    with s3_server(port) as address:
        uri = new_bucket(address, monkeypatch, tmp_path)
        journal = journal_of(uri, database)
        journal.append(SessionBegan(session=1))
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    with pytest.raises(OSError, match="Could not connect"):
        journal.append(TrialContinued(number=1))
    monkeypatch.setattr(storage, "PATIENCE_S", 600.0)
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(
            storage.time, "sleep", lambda _seconds: stack.enter_context(s3_server(port))
        )
        journal.append(TrialContinued(number=2))
        assert caplog.text.count("does not take a write; the search waits for it") == 1
        folder = Storage(uri).folder("one")
        assert present(folder)
        assert [event.kind for event in read_events(folder.local / JOURNAL_FILE)] == [
            "session",
            "continued",
            "continued",
        ]
        journal.close()


def test_a_place_that_is_none_is_refused(
    bucket: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    with pytest.raises(
        UserError,
        match=(
            r"search\.storage_path: ftp://x is not a directory, and not a bucket "
            r"such as s3://NAME/s"
        ),
    ):
        Storage("ftp://x")
    away = Storage("s3://nowhere/searches?" + bucket.partition("?")[2])
    fence = Fence(database, "one", "me")
    fence.take()
    with pytest.raises(OSError, match=r"(?i)bucket"):
        Mirror(away.bucket, f"{away.root}/one", "one", fence).push(b"x")  # type: ignore[arg-type]
    fence.release()
    with pytest.raises(UserError, match="the journal of one cannot be kept in its bucket: "):
        journal_of("s3://nowhere/searches?" + bucket.partition("?")[2], database)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_a_search_in_a_bucket_is_resumed_and_exported_on_another_machine(
    bucket: str, tmp_path: Path, postgres: str
) -> None:
    config = small_config(
        tmp_path, search={"trials": 3, "storage": postgres, "early_stopping": {"grace": 1}}
    )
    search = config.search.model_copy(update={"storage_path": bucket})
    first = run_search(config.model_copy(update={"search": search}), name="away")
    assert (
        len(first.ledger.with_status("completed")) + len(first.ledger.with_status("stopped")) == 3
    )
    assert all(point.tested is not None for point in first.front)
    another_machine(tmp_path)
    with pytest.raises(
        UserError, match=r"there is no search 'awy' in s3://b\d+/searches; did you mean 'away'\?"
    ):
        resume_search("awy", storage_path=bucket)
    again = resume_search(
        "away", ["search.trials=5", f"search.storage={postgres}"], storage_path=bucket
    )
    assert len(again.ledger.trials) == 5
    assert [trial.label for trial in again.ledger.trials[:3]] == [
        trial.label for trial in first.ledger.trials
    ]
    another_machine(tmp_path)
    shipped = export("away", bucket, "knee", tmp_path / "knee.safetensors")
    assert shipped.shipment.path.exists()
    files, root = fs.FileSystem.from_uri(bucket)
    infos = files.get_file_info(fs.FileSelector(f"{root}/away", recursive=True))
    kept = {info.path.rsplit("/", 1)[0] for info in infos if info.path.endswith("/network.pt")}
    assert len(kept) == len(
        {point.origin.checkpoint for point in again.front} | {again.ledger.dense.last.checkpoint}
    )  # type: ignore[union-attr]
    everything = b"".join(
        files.open_input_stream(info.path).read() for info in infos if info.is_file
    )
    assert b"secret@" not in everything


def test_a_bucket_needs_a_database(tmp_path: Path) -> None:
    from pydantic import ValidationError

    with pytest.raises(
        ValidationError,
        match=r"search\.storage_path is a bucket, which cannot keep Optuna's study; set search\.st",
    ):
        small_config(tmp_path, search={"trials": 1}).model_validate(
            {
                **small_config(tmp_path).model_dump(mode="json"),
                "search": {"storage_path": "s3://b/x"},
            }
        )


def test_copies_are_not_kept_where_others_may_write(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    place = tmp_path / "shared" / f"slimfront-{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(
        UserError,
        match=(
            r"copies of what is in a bucket cannot be kept .*others may write to "
            r"it; .* set TMPDIR"
        ),
    ):
        Storage(bucket).folder("one")
