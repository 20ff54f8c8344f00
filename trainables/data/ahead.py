"""Work done ahead in the background, in order and no further ahead than memory allows."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

log = logging.getLogger(__name__)


def _thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="slimfront-ahead")


def ahead(
    make: Callable[[Item], Made],
    items: Iterable[Item],
    depth: int,
    start: Callable[[], Executor] = _thread,
) -> Generator[Made]:
    """`make(item)` of each item, in the order of the items, made in the background while the caller
    is busy with earlier ones.

    What is made but not yet asked for never exceeds `depth`: a slow caller holds the makers back.
    Items are drawn in the caller's thread. What `make` raises is raised here, in its turn. Closing
    the iterator (`contextlib.closing`), as an exception or its end does, waits for the makers: none
    outlives it.

    Args:
        start: starts the makers, one thread if left out.
    """
    pool = start()
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)


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
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self.SECONDS
        percent = 100 * self.done // self.total
        log.info("%s: %d %% of %s", self.what, percent, f"{self.total:,}")
