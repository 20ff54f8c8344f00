"""The two kinds of error that slimfront raises on purpose, and what is told of all others."""

import traceback
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. One sentence: what is wrong, where, and what would be right.

    The command line prints it without a traceback and ends with exit code 2.
    """


class TrialFailure(Exception):
    """A trial that cannot go on (divergence, a compaction mismatch). The message is the recorded reason.

    The search goes on, and the process that ran the trial stays usable.
    """


def reason(error: Exception) -> str:
    """Why a trial cannot go on, in one sentence: our own messages as they are, others with kind and place."""
    if isinstance(error, UserError | TrialFailure):
        return str(error)
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {message}' if message else ''}{where}"
