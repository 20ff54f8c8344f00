"""Ends what is left of a search on this machine: processes of its Ray, and those that its trials
started.

A process belongs to a search if its environment has the search's mark, or if it has a file of the
search's own Ray open. A fork has its parent's files, and its environment cannot be read where the
parent was renamed, as Ray renames its workers.

A watcher does the same if the driver is killed. It is this file, run as a program, and imports
nothing but what is always there.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "SLIMFRONT_SEARCH_PROCESSES"
"""The environment variable of the mark."""

_POLITE_S = 3.0
"""How long a process has to end after it was asked, before it is killed."""
_RAY = (
    "/raylet",
    "/gcs_server",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "/ray/dashboard/",
    "/ray/autoscaler/",
    "/ray/_private/",
)
"""What stands in the command lines of Ray's own processes, but for workers: a fork of one has its
name."""
_STARTS, _STARTED = "starts", "started"
"""What the watcher is told, beside a directory."""
_ABORTED = (
    "Error: this process was ended while Ray started: Ray aborts where it cannot go on, and what "
    "it said stands above; no trial has run: try again, when the machine has less to do"
)
_HELPERS = ("resource_tracker", "multiprocessing.forkserver")
"""Processes of Python's own that end with the one that started them."""


class Leftovers:
    """The processes of one search, but for the driver, which makes this, and the watcher."""

    def __init__(self) -> None:
        self.mark = os.urandom(12).hex()
        self.directory: Path | None = None
        self.prefix: bytes | None = None
        """How an entry of their environment begins, in the place of the mark."""
        self.spared = {os.getpid()}
        self.watcher: subprocess.Popen[str] | None = None

    def watch(self) -> None:
        """Starts the watcher."""
        command = [sys.executable, "-I", "-S", __file__, self.mark, str(os.getpid())]
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        # In a session of its own: Ctrl-C and the end of a terminal are not for it.
        self.watcher = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.spared.add(self.watcher.pid)

    def starts(self) -> None:
        """Says that Ray is about to start, which may end this process in C++: then the watcher
        tells it."""
        self._tell(_STARTS)

    def belongs(self, directory: str) -> None:
        """Says where the search's own Ray, which has started, keeps its files."""
        self.directory = Path(directory)
        self._tell(directory)

    def started(self) -> None:
        """Says that what is told from here on is this process's own."""
        self._tell(_STARTED)

    def _tell(self, line: str) -> None:
        if self.watcher is not None and self.watcher.stdin is not None:
            self.watcher.stdin.write(f"{line}\n")
            self.watcher.stdin.flush()

    def release(self) -> None:
        """Ends the watcher, which then does nothing."""
        if self.watcher is not None:
            # Without a word to it: what it would be told it could misunderstand.
            self.watcher.kill()
            self.watcher.wait()
            assert self.watcher.stdin is not None
            self.watcher.stdin.close()

    def left(self) -> dict[int, str]:
        """Processes that belong to the search, by id, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            number = int(folder.name)
            try:
                if number not in self.spared and self._belongs(folder):
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    text = " ".join(words).strip()
                    # A zombie has no command line.
                    if text and not any(helper in text for helper in _HELPERS):
                        found[number] = text
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def _belongs(self, folder: Path) -> bool:
        environment = (folder / "environ").read_bytes().split(b"\0")
        if self.prefix is not None:
            return any(entry.startswith(self.prefix) for entry in environment)
        if f"{MARK}={self.mark}".encode() in environment:
            return True
        if self.directory is None:
            return False
        inside = f"{self.directory}/"
        for file in (folder / "fd").iterdir():
            try:
                if str(file.readlink()).startswith(inside):
                    return True
            except OSError:  # it was closed
                continue
        return False

    def end(self, patience: float = 0.0) -> list[str]:
        """Ends what is left; the command lines of what was not Ray's own.

        Args:
            patience: seconds in which it may end by itself.
        """
        ends = time.monotonic() + patience
        while (left := self.left()) and time.monotonic() < ends:
            time.sleep(0.1)
        told = dict(left)
        signals = dict.fromkeys(left, signal.SIGTERM)
        ends = time.monotonic() + _POLITE_S
        while left:
            for number in left:
                wanted = (
                    signal.SIGKILL
                    if time.monotonic() >= ends
                    else signals.get(number, signal.SIGTERM)
                )
                try:
                    os.kill(number, wanted)
                except OSError:
                    continue
            if time.monotonic() >= ends + _POLITE_S:
                break  # stuck in the kernel, which nobody can end
            time.sleep(0.1)
            left = self.left()
            told = left | told
        return [text for text in told.values() if not any(own in text for own in _RAY)]


@contextmanager
def nothing_left() -> Iterator[Leftovers]:
    """Around a search: what its processes started on this machine ends with it, also if this
    process is killed."""
    leftovers = Leftovers()
    before = os.environ.get(MARK)
    os.environ[MARK] = leftovers.mark
    leftovers.watch()
    try:
        yield leftovers
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        leftovers.release()


def end_here(prefix: str) -> list[str]:
    """Ends the processes of this machine whose environment has an entry that begins so; their
    command lines."""
    leftovers = Leftovers()
    leftovers.prefix = prefix.encode()
    return leftovers.end()


def watch(mark: str, driver: int) -> None:
    """What the watcher does: waits until the driver is gone, and then ends what is left."""
    leftovers = Leftovers()
    leftovers.mark = mark
    starts = False
    text = b""
    os.set_blocking(0, False)
    while True:
        gone = os.getppid() != driver  # and then what it said last
        if not gone:
            select.select([0], [], [], 0.5)
        said = _said()
        text += said
        *lines, rest = text.split(b"\n")
        for line in lines:
            if line.startswith(b"/"):
                leftovers.directory = Path(os.fsdecode(line))
            if line:
                starts = line == _STARTS.encode()
        text = rest
        if gone:
            break
        if not said:  # its end: what the driver started has closed it too, or the driver is going
            time.sleep(0.2)
    if starts:
        print(_ABORTED, file=sys.stderr, flush=True)
    leftovers.end()


def _said() -> bytes:
    try:
        return os.read(0, 65536)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))
