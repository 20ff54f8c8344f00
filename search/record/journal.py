"""The journal of a search: what happened, one JSON object a line, safe before anything else hears
of it.

It is the one truth about a search. The records in memory, the runs in MLflow, the rungs of early
stopping and what Optuna is told of trials that ended all follow from it. Beside it stands only
Optuna's study, which knows what was proposed.
"""

import errno
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from slimfront.search.record.fencing import Fence
from slimfront.search.record.locate import JOURNAL_FILE as JOURNAL_FILE
from slimfront.search.record.storage import Folder, Mirror
from slimfront.trainables.errors import UserError, one_line
from slimfront.trainables.redaction import redact

LOCK_FILE = "lock"

Event = dict[str, Any]
"""`event` is its kind, `n` its number from 1, `time` its time in ms, `elapsed` the ms since the
process of its session opened the journal, on a clock that nobody sets; the rest depends on the kind
(see `Ledger.apply`)."""

_KEYS: dict[str, tuple[str, ...]] = {
    "begun": ("time", "config", "dense_sizes", "starts"),
    "session": ("time", "session"),
    "trial": ("time", "number", "values", "seed"),
    "epochs": ("time", "number", "history"),
    "point": ("time", "number", "epoch", "measures", "compaction", "checkpoint"),
    "moved": ("time", "number", "epoch", "checkpoint"),
    "ended": ("time", "number", "status", "reason"),
    "interrupted": ("time", "number"),
    "continued": ("time", "number"),
    "tested": ("time", "number", "epoch", "test_accuracy"),
    "rung": ("time", "entry"),
    "finished": ("time", "status", "seconds"),
}
"""What an event of each kind has."""

_CAN_WAIT = ("epochs", "rung")
"""Kinds that a bucket gets with the next event of another kind: what they say is said again by a
trial that is continued."""


def read_events(file: Path) -> Iterator[Event]:
    """The events of a journal in order; a last line that a crash cut off is left out.

    Raises:
        UserError: if the file cannot be read, or a line within it is damaged.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"the journal {file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # after the last newline there is nothing, or what a dying process wrote
        try:
            event = _decoded(line, number)
        except (ValueError, RecursionError) as error:
            raise damaged(file, number, str(error)) from None
        yield event


def damaged(file: Path, number: int, reason: str) -> UserError:
    """What is said of a journal whose line `number` is not as it was written."""
    why = one_line(reason, 100)
    return UserError(
        f"the journal {file} is damaged in line {number}; restore it from a copy, or start a new "
        f"search ({why})"
    )


def _encoded(event: Event) -> bytes:
    """An event as a line, which ends with a checksum of all before it."""
    text = json.dumps(event, separators=(",", ":")).encode()[:-1]
    return b'%s,"crc":"%08x"}\n' % (text, zlib.crc32(text))


def _decoded(line: bytes, number: int) -> Event:
    """The event of a line, the `number`-th from 1. Journals of version 0.1 have neither numbers nor
    checksums.

    Raises:
        ValueError: if it is none, or not as it was written, or another line is missing or there
            twice.
    """
    text, mark, check = line.rpartition(b',"crc":"')
    if mark and check != b'%08x"}' % zlib.crc32(text):
        raise ValueError("its checksum is another")
    event = json.loads(line)
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("it is no event")
    if "n" in event and event.pop("crc", None) is None:
        raise ValueError("its checksum is not there")
    if event.get("n", number) != number:
        raise ValueError(
            f"it was written as line {event['n']}: lines before it are missing, or there twice"
        )
    missing = [key for key in _KEYS.get(event["event"], ()) if key not in event]
    if missing:
        raise ValueError(f"its event '{event['event']}' has no '{missing[0]}'")
    return event


def present(folder: Folder) -> bool:
    """Whether there is a journal in a search's folder; one in a bucket is copied to this machine.

    Raises:
        UserError: if the bucket does not answer.
    """
    file, mirror = folder.local / JOURNAL_FILE, folder.mirror()
    if mirror is not None:
        try:
            mirror.pull(file)
        except OSError as error:
            raise UserError(
                f"the journal of {folder.search} cannot be read from {folder.root}: {error}"
            ) from None
    return file.is_file()


class Journal:
    """Appends events to the journal of a search's folder, each one safe on disk before `append`
    returns.

    In a bucket it is safe there too, but for reports of epochs, which go with the event that
    follows. One process at a time: it holds a lock on the folder, which the system releases however
    the process ends; one on a bucket is free after a minute.
    """

    def __init__(self, directory: Path, mirror: Mirror | None = None) -> None:
        """Opens it for writing, and cuts off a last line that a crash left unfinished.

        Args:
            directory: of the search, on this machine.
            mirror: what keeps it in a bucket, with a fence.

        Raises:
            UserError: if another process is running this search, or the bucket or the database does
                not answer.
        """
        path = directory / JOURNAL_FILE
        self.mirror = mirror
        self.waiting = b""
        try:
            self.lock: IO[str] = (directory / LOCK_FILE).open("a+")
        except OSError as error:
            raise UserError(
                f"the lock {directory / LOCK_FILE} cannot be taken ({error.strerror}); remove what "
                "is there"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mirror is not None:
                mirror.take()
                mirror.pull(path)
        except BlockingIOError:
            self.lock.close()
            raise UserError(
                f"the search {directory.name} is running in another process; wait for its end, or "
                "end it"
            ) from None
        except OSError as error:
            self.lock.close()
            raise UserError(
                f"the journal of {directory.name} cannot be kept in its bucket: {error}"
            ) from None
        except UserError:
            self.lock.close()
            raise
        self.file = path.open(
            "ab", buffering=0
        )  # what could not be written must not be tried again when it is closed
        content = path.read_bytes()
        self.size = content.rfind(b"\n") + 1
        self.count = content.count(b"\n")
        self.file.truncate(self.size)
        self.begun = time.monotonic()

    @property
    def fence(self) -> Fence | None:
        """What says whether this process may still write to a search in a bucket."""
        return None if self.mirror is None else self.mirror.fence

    def append(self, kind: str, **content: Any) -> Event:
        """Writes one event; returns it with its time. Raises OSError if it could not be made safe.

        A reason is text from anywhere, such as an exception of the user's code: its secrets are
        hidden.
        """
        if isinstance(content.get("reason"), str):
            content["reason"] = redact(content["reason"], names=True)
        elapsed = round(1000 * (time.monotonic() - self.begun))
        event = {
            "event": kind,
            "n": self.count + 1,
            "time": time.time_ns() // 1_000_000,
            "elapsed": elapsed,
            **content,
        }
        line = _encoded(event)
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file.name))
            os.fsync(self.file.fileno())
        except OSError:
            with suppress(
                OSError
            ):  # a part of a line is cut off when the journal is opened again, too
                self.file.truncate(self.size)
            raise
        self.size += len(line)
        self.count += 1
        if self.mirror is not None:
            self.waiting += line
            if kind not in _CAN_WAIT:
                self.mirror.push(self.waiting)
                self.waiting = b""
        return event

    def close(self) -> None:
        """Closes the file and lets go of the folder; twice does no harm."""
        if self.mirror is not None and not self.file.closed:
            self.mirror.release()
        self.file.close()
        self.lock.close()
