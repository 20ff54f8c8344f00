"""Where searches are kept: a directory, or the bucket of an S3-compatible object store."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from slimfront.search.config.names import is_bucket
from slimfront.search.record.fencing import Fence, Superseded
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.folders import own_folder
from slimfront.trainables.redaction import without_secrets

SEGMENT_BYTES = 256 * 1024
"""An object that holds a part of a journal is written anew with each event until it has so many
bytes; then comes the next."""

_FIRST = "-00000000.jsonl"
"""How the name of the first object of a driver ends."""

_TAKEN = "taken"
"""The key of what a driver found."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a file system that takes no more: a full disk, no inodes left, a quota, a limit on
files, read-only of a sudden."""

PATIENCE_S = 600.0
"""How long a write to a bucket that does not answer is tried again."""

log = logging.getLogger(__name__)


def join(place: str, relative: str) -> str:
    """A path below a directory or a bucket; what follows the `?` of a URI stays at its end."""
    if not is_bucket(place):
        return str(Path(place, relative))
    base, mark, query = place.partition("?")
    return f"{base.rstrip('/')}/{relative}{mark}{query}"


def parent(place: str) -> str:
    """The storage path in which a search's folder is: `join` undone."""
    base = place
    query = ""
    if is_bucket(place):
        base, mark, query = place.partition("?")
        query = mark + query
    above = base.rstrip("/").rpartition("/")[0] or "/"
    return above + query


def check_place(storage_path: str) -> None:
    """Raises UserError for a directory that nothing can be written to; a bucket is not asked."""
    if is_bucket(storage_path):
        return
    folder = Path(storage_path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        Path(tempfile.mkdtemp(dir=folder)).rmdir()
    except OSError as error:
        raise UserError(
            f"search.storage_path: nothing can be written to {folder}: {error.strerror}"
        ) from None


def fetch(folder: str, name: str) -> Path:
    """A file of a checkpoint, on this machine: where it lies, or a copy of what lies in a bucket.

    Raises:
        UserError: if the bucket does not give it.
    """
    if not is_bucket(folder):
        return Path(folder, name)
    copy = _local(folder) / name
    if not copy.exists():
        try:
            files, path = fs.FileSystem.from_uri(folder)
            content = _read(files, f"{path}/{name}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
            part.write_bytes(content)
            part.replace(copy)
        except OSError as error:
            raise UserError(
                f"{name} of {folder.partition('?')[0]} cannot be read: {error}"
            ) from None
    return copy


def delete(folder: str) -> None:
    """Deletes a checkpoint; one that is gone already, or cannot be deleted, stays as it is."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(_local(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        files, path = fs.FileSystem.from_uri(folder)
        files.delete_dir(path)


def _local(folder: str) -> Path:
    """Where this machine keeps what belongs to a folder of a bucket.

    Raises:
        UserError: if that place is not this user's alone.
    """
    digest = hashlib.sha256(folder.encode()).hexdigest()[:16]
    users = Path(tempfile.gettempdir(), f"slimfront-{os.getuid()}")
    try:
        return own_folder(users) / digest
    except OSError as error:
        raise UserError(
            f"copies of what is in a bucket cannot be kept in {error.filename}: {error.strerror}; "
            "remove it, or set TMPDIR to a "
            "folder of yours"
        ) from None


def _read(files: fs.FileSystem, path: str) -> bytes:
    with files.open_input_stream(path) as stream:
        return bytes(stream.read())


def _write(files: fs.FileSystem, path: str, content: bytes) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(content)


class Storage:
    """The storage path of a config, in which every search has a folder of its own."""

    def __init__(self, storage_path: str) -> None:
        """Raises UserError if it is a URI that nothing here can read."""
        self.bucket: fs.FileSystem | None = None
        if not is_bucket(storage_path):
            self.place = str(Path(storage_path).resolve())
            return
        self.place = storage_path
        try:
            self.bucket, self.root = fs.FileSystem.from_uri(storage_path)
        except (ValueError, OSError) as error:
            reason = first_line(error)
            raise UserError(
                f"search.storage_path: {storage_path} is not a directory, and not a bucket such as "
                f"s3://NAME/searches: {reason}"
            ) from None

    @property
    def shown(self) -> str:
        """The path as it may be printed: without keys that its URI may hold."""
        if self.bucket:
            return without_secrets(self.place).partition("?")[0]
        return self.place

    def folder(self, search: str) -> "Folder":
        """The folder of a search, whether it is there or not."""
        place = join(self.place, search)
        if self.bucket is None:
            return Folder(search=search, local=Path(place), place=place, bucket=None, root=place)
        local = _local(place) / search
        return Folder(
            search=search,
            local=local,
            place=place,
            bucket=self.bucket,
            root=f"{self.root}/{search}",
        )

    def make(self, search: str) -> "Folder":
        """A new folder. Raises FileExistsError if there is one, and OSError if it cannot be
        made."""
        folder = self.folder(search)
        if self.bucket is None:
            folder.local.mkdir(parents=True)
        elif self.bucket.get_file_info(folder.root).type != fs.FileType.NotFound:
            raise FileExistsError(folder.root)
        else:
            shutil.rmtree(folder.local, ignore_errors=True)
            folder.local.mkdir(parents=True)
        return folder

    def searches(self, journal: str) -> list[str]:
        """The names of the searches here: what has a journal of that name."""
        if self.bucket is None:
            files = Path(self.place).glob(f"*/{journal}")
            names = [file.parent.name for file in files]
            return sorted(names)
        everything = fs.FileSelector(self.root, allow_not_found=True)
        try:
            infos = self.bucket.get_file_info(everything)
        except OSError as error:
            raise UserError(f"{self.shown} cannot be listed: {error}") from None
        folders = [info for info in infos if info.type == fs.FileType.Directory]
        return sorted(folder.base_name for folder in folders)


@dataclass(frozen=True)
class Folder:
    """The folder of one search."""

    search: str
    local: Path
    """On this machine: its journal, its lock and, without a database, its study. In a bucket's case
    a copy that can be lost."""
    place: str
    """Where its checkpoints are: a directory, or a URI."""
    bucket: fs.FileSystem | None
    root: str
    """The same as `place`, as the bucket's file system names it."""

    def absolute(self, relative: str) -> str:
        """A path below the folder, or the URI of it."""
        return join(self.place, relative)

    def relative(self, path: str) -> str:
        """What `absolute` makes the path of; as Ray names it, without the bucket's scheme."""
        return os.path.relpath(path, self.root)

    def mirror(self, database: str | None = None) -> "Mirror | None":
        """What keeps a journal in a bucket; None where it lies in a directory.

        Args:
            database: of the study, which a driver needs; without it the mirror is for reading
                alone.
        """
        if self.bucket is None:
            return None
        fence = None
        if database is not None:
            owner = f"{socket.gethostname()}, process {os.getpid()}"
            fence = Fence(database, self.root[-250:], owner)
        return Mirror(self.bucket, self.root, self.search, fence)


class Mirror:
    """Keeps the journal of a search in its bucket, as a row of objects, for one driver at a time.

    The objects of a driver have its number (`fencing.Fence`) in their names, and the first of them
    begins with what the driver
    found: the objects that it goes on from, and how much of each. So what a superseded driver
    writes is never read.
    """

    def __init__(
        self, bucket: fs.FileSystem, root: str, search: str, fence: Fence | None = None
    ) -> None:
        """Without a `fence` it is for reading alone."""
        self.bucket = bucket
        self.root = root
        self.search = search
        self.fence = fence
        self.history: dict[str, int] = {}
        self.segment = 0
        self.content = b""

    def segments(self) -> Iterator[tuple[str, bytes]]:
        """The parts of the journal in order, by the names of their objects. Raises OSError if the
        bucket does not answer."""
        selector = fs.FileSelector(f"{self.root}/journal", allow_not_found=True)
        infos = self.bucket.get_file_info(selector)
        names = sorted(str(info.base_name) for info in infos)
        objects: dict[str, bytes] = {}
        firsts = [name for name in names if name.endswith(_FIRST)]
        # Of the last driver, of the one before it …
        for first in reversed(firsts):
            objects[first] = self._read(first)
            history = _history(objects[first])
            if history is None:
                continue  # it was lost before it wrote anything
            for name, length in history.items():
                content = objects.get(name) or self._read(name)
                yield name, content[:length]
            fence = first.removesuffix(_FIRST)
            prefix = f"{fence}-"
            for name in names:
                if name.startswith(prefix):
                    yield name, objects.get(name) or self._read(name)
            return
        for name in names:  # a journal of version 0.1, which no driver has taken since
            if "-" not in name:
                yield name, self._read(name)

    def _read(self, name: str) -> bytes:
        return _read(self.bucket, f"{self.root}/journal/{name}")

    def pull(self, file: Path) -> None:
        """Writes the journal to `file`, as the bucket has it; without one, no file is left. Raises
        OSError."""
        parts = dict(self.segments())
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(_events(part) for part in parts.values())
        if lines:
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(lines)
            fresh.replace(file)
        else:
            file.unlink(missing_ok=True)
        self.history = {name: len(part) for name, part in parts.items()}
        self.segment = 0
        self.content = b""

    def push(self, lines: bytes) -> None:
        """Adds to the journal; when this returns, the bucket has it, and this driver was not
        superseded.

        Raises:
            OSError: if the bucket or the database has not answered for long; Superseded if another
                driver has the search.
        """
        assert self.fence is not None
        if not self.content and self.segment == 0:
            self.content = json.dumps({_TAKEN: self.history}).encode() + b"\n"
        content = self.content + lines
        path = f"{self.root}/journal/{self.fence.number:08d}-{self.segment:08d}.jsonl"
        began = time.monotonic()
        while True:
            try:
                self.fence.check()
                _write(self.bucket, path, content)
                self.fence.check()  # who took it meanwhile may not have seen this
                break
            except Superseded:
                raise
            except OSError as error:
                if time.monotonic() - began > PATIENCE_S:
                    raise
                log.warning(
                    "the bucket of %s does not take a write; the search waits for it (%s)",
                    self.search,
                    error,
                )
                time.sleep(5)
        self.content = content
        if len(content) >= SEGMENT_BYTES:
            self.segment += 1
            self.content = b""

    def take(self) -> None:
        """Takes the search for this process, until `release`.

        Raises:
            UserError: if another has it, or the database cannot be used.
            OSError: if the bucket takes no write.
        """
        assert self.fence is not None
        self.fence.take()
        driver = f"{self.fence.number}: {self.fence.owner}"
        try:
            _write(self.bucket, f"{self.root}/driver.txt", driver.encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Lets go of the search."""
        if self.fence is not None:
            self.fence.release()


def _history(first: bytes) -> dict[str, int] | None:
    """What a driver found when it took the search, by its first object; None if that is not one."""
    line, end, _ = first.partition(b"\n")
    if not end:
        return None
    try:
        taken = json.loads(line)[_TAKEN]
        if taken is None:
            return None
        return {str(name): int(length) for name, length in taken.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _events(part: bytes) -> bytes:
    """The lines of an object without what its driver found."""
    if _history(part) is None:
        return part
    _, _, lines = part.partition(b"\n")
    return lines
