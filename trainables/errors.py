"""The two kinds of error that slimfront raises on purpose, what is told of all others, and how
messages are kept short and few."""

import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slimfront.trainables.redaction import redact

_MOST = 480
"""So many characters has a message at most; with the word `Error` before it, a line has less than
500."""
OF_USERS_CODE = (Exception, SystemExit)
"""What code of a user's may raise: `sys.exit` in it, as in a script that is imported, ends nothing
of ours."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Something the user can put right. One sentence: what is wrong, where, and what would be
    right.

    The command line prints it without a traceback and ends with exit code 2. Secrets of URIs that
    it repeats are hidden.
    """

    def __init__(self, *parts: object) -> None:
        shown = []
        for part in parts:
            if isinstance(part, str):
                part = redact(part, names=True)
            shown.append(part)
        super().__init__(*shown)


class TrialFailure(Exception):
    """A trial that cannot go on (divergence, a compaction mismatch). The message is the recorded
    reason.

    The search goes on, and the process that ran the trial stays usable.
    """


def reason(error: BaseException) -> str:
    """Why a trial cannot go on, in one sentence: our own messages as they are, others with kind and
    place."""
    if isinstance(error, UserError | TrialFailure):
        return str(error)
    message = first_line_of(str(error))
    if message:
        message = f": {message}"
    where = ""
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        last = frames[-1]
        where = f" ({Path(last.filename).name}, line {last.lineno})"
    return f"{type(error).__name__}{message}{where}"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line that says something of what an error says, or else the name of its kind."""
    message = first_line_of(str(error))
    if not message:
        message = type(error).__name__
    return message[:most]


def first_line_of(text: str) -> str:
    """The first line of a text that says something, without the codes that colour a terminal;
    nothing if none does."""
    for line in _COLOURS.sub("", text).splitlines():
        if line.strip():
            return line.strip()
    return ""


def shorten(value: object, most: int = 60) -> str:
    """A value as a message may repeat it: without secrets, at most `most` characters, the middle of
    longer ones left out."""
    return _clip(redact(str(value)), most)


def _clip(text: str, most: int) -> str:
    half = (most - 3) // 2
    if len(text) <= most:
        return text
    return f"{text[:half]} … {text[len(text) - half :]}"


@contextmanager
def said_once() -> Iterator[None]:
    """Within, what was logged before in the same words is not shown again."""
    once = _Once()
    handlers = list(logging.getLogger().handlers)
    if not handlers and logging.lastResort is not None:
        handlers = [logging.lastResort]
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)


class _Once(logging.Filter):
    """Lets the first of several records that say the same through, to each handler."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, logging.LogRecord] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is shown."""
        return self.first.setdefault(record.getMessage(), record) is record


def first_few(names: Sequence[object], most: int = 10) -> str:
    """The first of some names, as a message lists them."""
    shown = ", ".join(map(str, names[:most]))
    if len(names) > most:
        return f"{shown} …"
    return shown


def one_line(message: str, most: int = _MOST) -> str:
    """A message on one line of at most `most` characters; what cannot be printed, such as a line
    break, is shown as an escape."""
    shown = ""
    for character in _clip(message, 10 * most):
        if character.isprintable():
            shown += character
        else:
            shown += character.encode("unicode_escape").decode()
    return _clip(shown, most)
