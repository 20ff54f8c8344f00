"""The head of a Ray cluster that stops while a search runs.

Ray waits a minute for its head and then aborts the driver in C++, where nothing can be caught. So
the search looks after the head itself, and ends before Ray does.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from slimfront.search.engine.interrupt import Interrupt

_LOOK_EVERY_S = 2.0
_LOST_AFTER = 5
"""So often in a row the head did not answer."""
_ORDERLY_S = 35.0
"""How long the search may take to end by itself; with what went before, Ray would still wait."""


class Head:
    """Whether the head of the cluster still answers; `lost` is set when it does not."""

    def __init__(self, address: str, interrupt: Interrupt, message: str) -> None:
        host, _, port = address.rpartition(":")
        self.place = (host, int(port))
        self.interrupt = interrupt
        self.message = message
        self.lost = threading.Event()
        self.over = threading.Event()
        self.ended = threading.Event()
        """Set by whoever tells the user what happened, in this process."""

    def answers(self) -> bool:
        """Whether something listens at its address."""
        try:
            socket.create_connection(self.place, timeout=_LOOK_EVERY_S).close()
        except OSError:
            return False
        return True

    def watch(self) -> None:
        """Looks until the search is over; ends the search, and in the end the process, if the head
        is lost."""
        missed = 0
        while not self.over.wait(_LOOK_EVERY_S):
            missed = 0 if self.answers() else missed + 1
            if missed == _LOST_AFTER:
                self.lost.set()
                self.interrupt.requested = True
                self._end_hard()
                return

    def _end_hard(self) -> None:
        """Ends the process where calls to Ray hang that an orderly end needs."""
        if not self.ended.wait(_ORDERLY_S):
            print(f"Error: {self.message}", file=sys.stderr, flush=True)
            os._exit(2)


@contextmanager
def watched_head(interrupt: Interrupt, message: str) -> Iterator[Head]:
    """Looks after the head of the cluster that this process has joined, within the block.

    Args:
        interrupt: asked to end the search when the head is lost.
        message: what is told where the search cannot end by itself any more.
    """
    head = Head(ray.get_runtime_context().gcs_address, interrupt, message)
    thread = threading.Thread(target=head.watch, name="slimfront-head", daemon=True)
    thread.start()
    try:
        yield head
    finally:
        head.over.set()
        if not head.lost.is_set():
            head.ended.set()
