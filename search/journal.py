"""The journal of a search: what happened, one JSON object a line, safe before anything else hears of it.

It is the one truth about a search. The records in memory, the runs in MLflow, the rungs of early stopping and what Optuna is told
of trials that ended all follow from it. Beside it stands only Optuna's study, which knows what was proposed.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from search.names import JOURNAL_FILE as JOURNAL_FILE
from search.storage import Folder, Mirror
from trainables.errors import UserError
from trainables.redaction import redact

LOCK_FILE = "lock"

Event = dict[str, Any]
"""`event` is its kind, `time` its time in ms; the rest depends on the kind (see `Ledger.apply`)."""

_CAN_WAIT = ("epochs", "rung")
"""Kinds that a bucket gets with the next event of another kind: what they say is said again by a trial that is continued."""


def read_events(file: Path) -> Iterator[Event]:
    """The events of a journal in order; a last line that a crash cut off is left out.

    Raises:
        UserError: if the file cannot be read, or a line within it is damaged.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"the journal {file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline there is nothing, or what a dying process wrote
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("not an event")
        except ValueError:
            raise UserError(
                f"the journal {file} is damaged in line {number}; restore it from a copy, or start a new search"
            ) from None
        yield event


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
            raise UserError(f"the journal of {folder.search} cannot be read from {folder.root}: {error}") from None
    return file.is_file()


class Journal:
    """Appends events to the journal of a search's folder, each one safe on disk before `append` returns.

    In a bucket it is safe there too, but for reports of epochs, which go with the event that follows. One process at a time: it
    holds a lock on the folder, which the system releases however the process ends, and which a bucket forgets in a minute.
    """

    def __init__(self, directory: Path, mirror: Mirror | None = None) -> None:
        """Opens it for writing, and cuts off a last line that a crash left unfinished.

        Raises:
            UserError: if another process is running this search, or the bucket does not answer.
        """
        path = directory / JOURNAL_FILE
        self.mirror = mirror
        self.waiting = b""
        self.lock: IO[str] = (directory / LOCK_FILE).open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mirror is not None:
                mirror.take()
                mirror.pull(path)
        except BlockingIOError:
            self.lock.close()
            raise UserError(f"the search {directory.name} is running in another process; wait for its end, or end it") from None
        except OSError as error:
            self.lock.close()
            raise UserError(f"the journal of {directory.name} cannot be kept in its bucket: {error}") from None
        except UserError:
            self.lock.close()
            raise
        self.file = path.open("ab")
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < self.file.tell():
            self.file.truncate(whole)

    def append(self, kind: str, **content: Any) -> Event:
        """Writes one event; returns it with its time. Raises OSError if it could not be made safe.

        A reason is text from anywhere, such as an exception of the user's code: its secrets are hidden.
        """
        if isinstance(content.get("reason"), str):
            content["reason"] = redact(content["reason"], names=True)
        event = {"event": kind, "time": time.time_ns() // 1_000_000, **content}
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        os.fsync(self.file.fileno())
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
