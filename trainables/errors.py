"""The two kinds of error that slimfront raises on purpose, and how their messages are kept to one short line."""

from trainables.redaction import redact

_MOST = 480
"""So many characters has a message at most; with the word `Error` before it, a line has less than 500."""


class UserError(Exception):
    """Something the user can put right. One sentence: what is wrong, where, and what would be right.

    The command line prints it without a traceback and ends with exit code 2. Secrets of URIs that it repeats are hidden.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(redact(part, names=True) if isinstance(part, str) else part for part in parts))


class TrialFailure(Exception):
    """A trial that cannot go on (divergence, a compaction mismatch). The message is the recorded reason.

    The search goes on, and the process that ran the trial stays usable.
    """


def shorten(value: object, most: int = 60) -> str:
    """A value as a message may repeat it: without secrets, at most `most` characters, the middle of longer ones left out."""
    return _clip(redact(str(value)), most)


def _clip(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[len(text) - half :]}"


def one_line(message: str, most: int = _MOST) -> str:
    """A message on one line of at most `most` characters; what cannot be printed, such as a line break, is shown as an escape."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _clip(message, 10 * most))
    return _clip(shown, most)
