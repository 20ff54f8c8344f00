"""What Ray prints into the driver's terminal past its loggers."""

import logging
from typing import Any

import ray
from ray.tune.progress_reporter import TrialProgressCallback

log = logging.getLogger(__name__)


def quieten() -> None:
    """Keeps Ray's own words out of the terminal: the observer says what they mean for a trial.

    Ray prints paragraphs about each process that dies by `print_to_stdstream`, whatever
    `log_to_driver` and the levels of its loggers say; no public switch leaves them out (Ray 2.60).
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    # It lists failed trials, which we report with reasons.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    ray._private.worker.print_to_stdstream = lambda data, **_: log.debug("%s", data)


class NothingPrinted(TrialProgressCallback):
    """In the place of what prints results of trials in Ray Tune, which keeps every trial that it
    has heard of, printed or not."""

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def on_trial_error(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Nothing."""
