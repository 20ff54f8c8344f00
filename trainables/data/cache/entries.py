"""The folder of the node's cache: its entries, their locks, and room for more."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from slimfront.trainables.folders import own_folder

FOLDER = "SLIMFRONT_CACHE"
"""The environment variable that names the folder of the cache."""

LIMIT = "SLIMFRONT_CACHE_GB"
"""The environment variable with its largest size, in 10⁹ bytes."""

log = logging.getLogger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{32}\.(data|part)")
"""The names of what is in the cache, beside locks."""


def cache_folder() -> Path:
    """The folder of the cache, made if it is not there.

    Raises:
        OSError: if it cannot be made, or is not this user's alone.
    """
    named = os.environ.get(FOLDER)
    # Where memory holds /tmp, /var/tmp is on a disk; whoever sets TMPDIR knows better.
    usual = "/var/tmp"  # noqa: S108 (it is made and checked by own_folder)
    if "TMPDIR" in os.environ or not os.access(usual, os.W_OK):
        usual = tempfile.gettempdir()
    folder = Path(usual, f"slimfront-{os.getuid()}")
    if named:
        folder = Path(named)
    return own_folder(folder, named=bool(named))


@cache
def code_version() -> str:
    """Changes with the code that decodes and splits."""
    libraries = [version(name) for name in ("pillow", "datasets", "scikit-learn", "torch")]
    digest = hashlib.sha256(" ".join(libraries).encode())
    data = Path(__file__).parents[1]
    tasks = data.parent / "tasks"
    for file in sorted([*data.rglob("*.py"), *tasks.glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[Path]:
    """Holds the lock at `path`, a file; raises BlockingIOError if another process holds it and
    `wait` is false."""
    how = fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, how)
            held = os.fstat(file.fileno())
            if not path.exists() or path.stat().st_ino != held.st_ino:
                continue  # its entry was thrown away while this process waited
            yield path
            return


def make_room(folder: Path, needed: int) -> None:
    """Throws away the entries that were not used for longest, until the cache with `needed` more
    bytes is within its limit.

    Raises:
        OSError: if that is not enough.
    """
    files = dict(_entries(folder))
    used = sum(state.st_blocks * 512 for state in files.values())
    named = os.environ.get(LIMIT)
    if named:
        limit = float(named) * 1e9
    else:
        free = shutil.disk_usage(folder).free
        limit = (used + free) / 2
    for file in sorted(files, key=lambda file: files[file].st_mtime):
        if used + needed <= limit:
            return
        try:
            with locked(file.with_suffix(".lock"), wait=False) as lock:
                file.unlink(missing_ok=True)
                lock.unlink()
                used -= files[file].st_blocks * 512
        except BlockingIOError:
            continue  # someone writes it, or this process does
    if used + needed > limit:
        what = (
            f"{needed / 1e9:.3g} GB do not fit beside {used / 1e9:.3g} GB into its "
            f"limit of {limit / 1e9:.3g} GB"
        )
        raise OSError(errno.ENOSPC, what, str(folder))


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of the cache, finished or not, with their states; whatever else is in its folder is
    none of ours."""
    for entry in os.scandir(folder):
        if _ENTRY.fullmatch(entry.name):
            with suppress(FileNotFoundError):
                state = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(state.st_mode) and state.st_uid == os.getuid():
                    yield Path(entry.path), state


@cache
def warn_once(message: str) -> None:
    """Warns, once in this process."""
    log.warning(message)
