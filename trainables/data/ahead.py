"""Work done ahead in background threads, in order and no further ahead than memory allows."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

log = logging.getLogger(__name__)


def ahead(make: Callable[[Item], Made], items: Iterable[Item], depth: int, workers: int = 1) -> Generator[Made]:
    """`make(item)` of each item, in the order of the items, made by `workers` threads while the caller is busy with earlier ones.

    What is made but not yet asked for never exceeds `depth`: a slow caller holds the threads back. Items are drawn in the
    caller's thread. What `make` raises is raised here, in its turn. Closing the iterator (`contextlib.closing`), as an
    exception or its end does, waits for the threads: none outlives it.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="slimfront-ahead")
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Progress:
    """Logs how much of long work is done, every few seconds; of short work nothing."""

    SECONDS = 5.0

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.next = time.monotonic() + self.SECONDS

    def advance(self, count: int) -> None:
        """Tells that so many more are done."""
        self.done += count
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.SECONDS
            log.info("%s: %d %% of %s", self.what, 100 * self.done // self.total, f"{self.total:,}")
