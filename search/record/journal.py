"""The journal of a search: what happened, one JSON object a line, safe before anything else hears
of it.

It is the one truth about a search. The records in memory, the runs in MLflow, the rungs of early
stopping and what Optuna is told of trials that ended all follow from it. Beside it stands only
Optuna's study, which knows what was proposed.
"""

import errno
import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from slimfront.search.record.events import (
    EpochsReported,
    Event,
    RungReached,
    TrialEnded,
    UnknownKind,
    parse,
)
from slimfront.search.record.fencing import Fence
from slimfront.search.record.locate import JOURNAL_FILE as JOURNAL_FILE
from slimfront.search.record.storage import Folder, Mirror
from slimfront.trainables.errors import UserError, one_line
from slimfront.trainables.redaction import redact

LOCK_FILE = "lock"

Written = TypeVar("Written", bound=Event)

log = logging.getLogger(__name__)

_CAN_WAIT = (EpochsReported, RungReached)
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
    # After the last newline there is nothing, or what a dying process wrote.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield _decoded(line, number)
        except UnknownKind as error:
            log.warning("line %d of the journal %s is left out: %s", number, file, error)
        except (ValueError, RecursionError) as error:
            raise damaged(file, number, str(error)) from None


def damaged(file: Path, number: int, reason: str) -> UserError:
    """What is said of a journal whose line `number` is not as it was written."""
    why = one_line(reason, 100)
    return UserError(
        f"the journal {file} is damaged in line {number}; restore it from a copy, or start a new "
        f"search ({why})"
    )


def _encoded(event: Event) -> bytes:
    """An event as a line, which ends with a checksum of all before it."""
    text = json.dumps(event.as_plain(), separators=(",", ":"))
    open_ended = text.encode()[:-1]
    checksum = zlib.crc32(open_ended)
    return b'%s,"crc":"%08x"}\n' % (open_ended, checksum)


def _decoded(line: bytes, number: int) -> Event:
    """The event of a line, the `number`-th from 1. Journals of version 0.1 have neither numbers nor
    checksums.

    Raises:
        UnknownKind: if it is of a kind that this version does not know.
        ValueError: if it is none, or not as it was written, or another line is missing or there
            twice.
    """
    text, mark, check = line.rpartition(b',"crc":"')
    if mark and check != b'%08x"}' % zlib.crc32(text):
        raise ValueError("its checksum is another")
    plain = json.loads(line)
    if not isinstance(plain, dict):
        raise ValueError("it is no event")
    if "n" in plain and "crc" not in plain:
        raise ValueError("its checksum is not there")
    if plain.get("n", number) != number:
        raise ValueError(
            f"it was written as line {plain['n']}: lines before it are missing, or there twice"
        )
    return parse(plain)


def present(folder: Folder) -> bool:
    """Whether there is a journal in a search's folder; one in a bucket is copied to this machine.

    Raises:
        UserError: if the bucket does not answer.
    """
    file = folder.local / JOURNAL_FILE
    mirror = folder.mirror()
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
        # What could not be written must not be tried again when it is closed.
        self.file = path.open("ab", buffering=0)
        content = path.read_bytes()
        self.size = content.rfind(b"\n") + 1
        self.count = content.count(b"\n")
        self.file.truncate(self.size)
        self.begun = time.monotonic()

    @property
    def fence(self) -> Fence | None:
        """What says whether this process may still write to a search in a bucket."""
        if self.mirror is None:
            return None
        return self.mirror.fence

    def append(self, event: Written) -> Written:
        """Writes one event; returns it with its number and time.

        A reason is text from anywhere, such as an exception of the user's code: its secrets are
        hidden.

        Raises:
            OSError: if it could not be made safe.
        """
        stamp: dict[str, Any] = {
            "n": self.count + 1,
            "time": time.time_ns() // 1_000_000,
            "elapsed": round(1000 * (time.monotonic() - self.begun)),
        }
        if isinstance(event, TrialEnded) and event.reason is not None:
            stamp["reason"] = redact(event.reason, names=True)
        event = event.model_copy(update=stamp)
        line = _encoded(event)
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file.name))
            os.fsync(self.file.fileno())
        except OSError:
            # A part of a line is cut off when the journal is opened again, too.
            with suppress(OSError):
                self.file.truncate(self.size)
            raise
        self.size += len(line)
        self.count += 1
        if self.mirror is not None:
            self.waiting += line
            if not isinstance(event, _CAN_WAIT):
                self.mirror.push(self.waiting)
                self.waiting = b""
        return event

    def close(self) -> None:
        """Closes the file and lets go of the folder; twice does no harm."""
        if self.mirror is not None and not self.file.closed:
            self.mirror.release()
        self.file.close()
        self.lock.close()
