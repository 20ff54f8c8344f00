"""Room for what Ray and trials write on this machine while a search runs.

Ray's own directory has its logs and sockets, and trials put their checkpoints together in the
temporary one. Where these are full no process can start and no report can be kept, in ways that
differ and that Ray waits out or tells in C++. So the search looks after the room itself.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slimfront.search.engine.ray_internals.local_ray import session_directory
from slimfront.search.record.storage import NO_ROOM

_LOOK_EVERY_S = 2.0
_LEAST_BYTES = 500_000


class NoRoomForRay(OSError):
    """A directory of this machine, its `filename`, that Ray and trials write to is full."""


def no_room_for_ray() -> NoRoomForRay | None:
    """Whether such a directory is full now."""
    for folder in (session_directory(), tempfile.gettempdir()):
        try:
            state = os.statvfs(folder)
        except OSError:  # it is not there yet, or not on this machine
            continue
        free = state.f_bavail * state.f_frsize
        if free < _LEAST_BYTES or (state.f_files and not state.f_favail):
            return NoRoomForRay(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
    return None


def no_room_in(text: str) -> OSError | None:
    """The error of a file system that takes no more which this text of another process or of Ray's
    tells, if it does; that of Ray's directory here, if that is full."""
    for number in NO_ROOM:
        if f"[Errno {number}]" in text or os.strerror(number) in text:
            return _full_now_or_before() or OSError(number, os.strerror(number))
    return None


def for_want_of_room(error: OSError) -> bool:
    """Whether a file system, or one under a database, took no more."""
    told = str(error)
    known = any(os.strerror(number) in told for number in NO_ROOM)
    return error.errno in NO_ROOM or known or "disk is full" in told


def place_of(error: OSError) -> OSError:
    """An error for want of room as that of Ray's directory here, if that is full, or was a moment
    ago: what ends frees some of it."""
    if error.errno in NO_ROOM:
        return _full_now_or_before() or error
    return error


def _full_now_or_before() -> NoRoomForRay | None:
    return no_room_for_ray() or _seen.full


class _Seen:
    """What was seen of this search's directories."""

    full: NoRoomForRay | None = None


_seen = _Seen()


@contextmanager
def watched_room(end: Callable[[OSError], None]) -> Iterator[None]:
    """Looks within the block whether there is room; calls `end` once if there is none, twice in a
    row."""
    over = threading.Event()
    _seen.full = None

    def watch() -> None:
        missed = 0
        while not over.wait(_LOOK_EVERY_S):
            failure = no_room_for_ray()
            missed = missed + 1 if failure else 0
            _seen.full = failure or _seen.full
            if failure and missed == 2:
                end(failure)
                return

    thread = threading.Thread(target=watch, name="slimfront-room", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
