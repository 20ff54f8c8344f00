"""Where searches are kept: a directory, or the bucket of an S3-compatible object store."""

import contextlib
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
from typing import Any

from pyarrow import fs

from trainables.errors import UserError
from trainables.redaction import without_secrets

SEGMENT_BYTES = 256 * 1024
"""An object that holds a part of a journal is written anew with each event until it has so many bytes; then comes the next."""

LEASE_S = 60.0
"""A search in a bucket is taken by a driver for so long, which renews it; when the driver is lost, others must wait as long."""


PATIENCE_S = 600.0
"""How long a write to a bucket that does not answer is tried again."""

log = logging.getLogger(__name__)


def is_bucket(path: str) -> bool:
    """Whether a storage path names a bucket, such as `s3://bucket/searches`, and not a directory."""
    return "://" in path


def join(place: str, relative: str) -> str:
    """A path below a directory or a bucket; what follows the `?` of a URI stays at its end."""
    if not is_bucket(place):
        return str(Path(place, relative))
    base, mark, query = place.partition("?")
    return f"{base.rstrip('/')}/{relative}{mark}{query}"


def parent(place: str) -> str:
    """The storage path in which a search's folder is: `join` undone."""
    base, mark, query = place.partition("?") if is_bucket(place) else (place, "", "")
    return f"{base.rstrip('/').rpartition('/')[0] or '/'}{mark}{query}"


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
            copy.write_bytes(content)
        except OSError as error:
            raise UserError(f"{name} of {folder.partition('?')[0]} cannot be read: {error}") from None
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
    """Where this machine keeps what belongs to a folder of a bucket."""
    digest = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"slimfront-{os.getuid()}", digest)


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
            reason = str(error).splitlines()[0]
            raise UserError(
                f"search.storage_path: {storage_path} is not a directory, and not a bucket such as s3://NAME/searches: {reason}"
            ) from None

    @property
    def shown(self) -> str:
        """The path as it may be printed: without keys that its URI may hold."""
        return without_secrets(self.place).partition("?")[0] if self.bucket else self.place

    def folder(self, search: str) -> "Folder":
        """The folder of a search, whether it is there or not."""
        place = join(self.place, search)
        local = _local(place) / search if self.bucket else Path(place)
        return Folder(search, local, place, self.bucket, f"{self.root}/{search}" if self.bucket else place)

    def make(self, search: str) -> "Folder":
        """A new folder. Raises FileExistsError if there is one, and OSError if it cannot be made."""
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
            return sorted(file.parent.name for file in Path(self.place).glob(f"*/{journal}"))
        try:
            infos = self.bucket.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        except OSError as error:
            raise UserError(f"{self.shown} cannot be listed: {error}") from None
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


@dataclass(frozen=True)
class Folder:
    """The folder of one search."""

    search: str
    local: Path
    """On this machine: its journal, its lock and, without a database, its study. In a bucket's case a copy that can be lost."""
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

    def mirror(self) -> "Mirror | None":
        """What keeps a journal in a bucket; None where it lies in a directory."""
        return None if self.bucket is None else Mirror(self.bucket, self.root, self.search)


class Mirror:
    """Keeps the journal of a search in its bucket, as a row of objects, and the search to one driver at a time."""

    def __init__(self, bucket: fs.FileSystem, root: str, search: str) -> None:
        self.bucket, self.root, self.search = bucket, root, search
        self.owner = f"{socket.gethostname()}, process {os.getpid()}, {threading.get_ident()}-{time.monotonic_ns()}"
        self.segment, self.content = 0, b""
        self.closing = threading.Event()
        self.renewer: threading.Thread | None = None

    def segments(self) -> Iterator[bytes]:
        """The parts of the journal in order. Raises OSError if the bucket does not answer."""
        selector = fs.FileSelector(f"{self.root}/journal", allow_not_found=True)
        for info in sorted(self.bucket.get_file_info(selector), key=lambda info: str(info.base_name)):
            yield _read(self.bucket, info.path)

    def pull(self, file: Path) -> None:
        """Writes the journal to `file`, as the bucket has it; without one, no file is left. Raises OSError."""
        parts = list(self.segments())
        file.parent.mkdir(parents=True, exist_ok=True)
        if parts:
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(b"".join(parts))
            fresh.replace(file)
        else:
            file.unlink(missing_ok=True)
        self.segment, self.content = len(parts), b""

    def push(self, lines: bytes) -> None:
        """Adds to the journal; when this returns, the bucket has it. Raises OSError if it has not answered for long."""
        content = self.content + lines
        began = time.monotonic()
        while True:
            try:
                _write(self.bucket, f"{self.root}/journal/{self.segment:08d}.jsonl", content)
                break
            except OSError as error:
                if time.monotonic() - began > PATIENCE_S:
                    raise
                log.warning("the bucket of %s does not take a write; the search waits for it (%s)", self.search, error)
                time.sleep(5)
        full = len(content) >= SEGMENT_BYTES
        self.segment, self.content = (self.segment + 1, b"") if full else (self.segment, content)

    def take(self) -> None:
        """Takes the search for this process, until `release`. Raises UserError if another has it."""
        lease = self._lease()
        left = float(lease.get("until", 0)) - time.time()
        if left > 0:
            raise UserError(
                f"the search {self.search} is running in another process ({lease.get('owner')}), or was until it was lost; wait "
                f"for its end, or {left:.0f} s"
            )
        self._renew()
        self.renewer = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.renewer.start()

    def release(self) -> None:
        """Lets go of the search."""
        if self.renewer is None:
            return
        self.closing.set()
        self.renewer.join()
        self.renewer = None
        with contextlib.suppress(OSError):
            self.bucket.delete_file(f"{self.root}/lease.json")

    def _lease(self) -> dict[str, Any]:
        try:
            return dict(json.loads(_read(self.bucket, f"{self.root}/lease.json")))
        except FileNotFoundError:
            return {}

    def _renew(self) -> None:
        content = json.dumps({"owner": self.owner, "until": time.time() + LEASE_S})
        # Always as long: who reads while it is written anew gets the one or the other, and not the beginning of one.
        _write(self.bucket, f"{self.root}/lease.json", content.ljust(400).encode())

    def _keep(self) -> None:
        while not self.closing.wait(LEASE_S / 3):
            with contextlib.suppress(OSError):  # the next time it may work; the journal tells if the bucket is gone
                self._renew()
