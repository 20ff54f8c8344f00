"""The journal of a search: what happened, one JSON object a line, on disk before anything else hears of it.

It is the one truth about a search. The records in memory, the runs in MLflow and what Optuna is told of trials that ended all
follow from it. Beside it stand only Optuna's study, which knows what was proposed, and the rungs of early stopping.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trainables.errors import UserError

JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"

Event = dict[str, Any]
"""`event` is its kind, `time` its time in ms; the rest depends on the kind (see `Ledger.apply`)."""


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


class Journal:
    """Appends events to the journal of a search directory, each one safe on disk before `append` returns.

    One process at a time: it holds a lock on the directory, which the system releases however the process ends.
    """

    def __init__(self, directory: Path) -> None:
        """Opens it for writing, and cuts off a last line that a crash left unfinished.

        Raises:
            UserError: if another process is running this search.
        """
        self.lock: IO[str] = (directory / LOCK_FILE).open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise UserError(f"the search {directory.name} is running in another process; wait for its end, or end it") from None
        path = directory / JOURNAL_FILE
        self.file = path.open("ab")
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < self.file.tell():
            self.file.truncate(whole)

    def append(self, kind: str, **content: Any) -> Event:
        """Writes one event; returns it with its time."""
        event = {"event": kind, "time": time.time_ns() // 1_000_000, **content}
        self.file.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        return event

    def close(self) -> None:
        """Closes the file and lets go of the directory; twice does no harm."""
        self.file.close()
        self.lock.close()
