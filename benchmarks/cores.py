"""Core-seconds and wall time of a search: user and system time of this process and of all that it
has started, by kind."""

import threading
import time
from collections import Counter
from contextlib import suppress

import psutil

_EVERY_S = 0.25


class Cores:
    """Looks at the processes every so often, so that those which have ended are counted up to the
    last look at them."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, float], tuple[str, float]] = {}
        self.known: dict[tuple[int, float], psutil.Process] = {}
        self.own = 0.0
        """Seconds that looking took, which do not count."""
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.begun = time.monotonic()
        self.before = self.look()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ending.wait(_EVERY_S):
            self.look()

    def look(self) -> Counter[str]:
        """Core-seconds so far by kind of process: driver, trials, and Ray's own."""
        with self.lock:
            began = time.thread_time()
            this = psutil.Process()
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error):
                    key = (process.pid, process.create_time())
                    process = self.known.setdefault(key, process)
                    times = process.cpu_times()
                    kind = "driver" if process.pid == this.pid else _kind(process)
                    self.seen[key] = (kind, times.user + times.system)
            self.own += time.thread_time() - began
            found: Counter[str] = Counter()
            for kind, seconds in self.seen.values():
                found[kind] += seconds
            found["driver"] -= self.own
            return found

    def close(self) -> None:
        """Looks no more."""
        self.ending.set()
        self.thread.join()


def _kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return "trials" if command.startswith("ray::") or "default_worker.py" in command else "Ray"
