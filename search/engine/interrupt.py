"""What ends a search before its last trial: Ctrl-C (the first gracefully, the second at once), or
its time."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray import tune

log = logging.getLogger(__name__)


class Interrupt(tune.Stopper):
    """Ends the search at the first Ctrl-C (or SIGTERM), or when its time is up, gracefully; a
    second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self.deadline: float | None = None

    def end_after(self, seconds: float | None) -> None:
        """Sets the time, from now on; None is no end."""
        self.deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def out_of_time(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped."""
        return False

    def stop_all(self) -> bool:
        """Asked by Tune in every round of its loop."""
        return self.requested or self.out_of_time

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listens while the block runs; in the main thread only, since signals reach no other."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                # At once: without waiting for threads that write to MLflow. Ray's processes end
                # when their driver does.
                os._exit(130)
            self.requested = True
            log.warning(
                "Stopping: running trials end, and the front of the finished ones follows. Ctrl-C "
                "again to quit at once."
            )

        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
