"""Says in one sentence what is wrong with a config: where, what, and what would be right."""

import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from slimfront.trainables.errors import shorten
from slimfront.trainables.redaction import redact


def explain(error: ValidationError) -> str:
    """The first problem, and how many more there are."""
    first = explain_first(error)
    more = error.error_count() - 1
    if more:
        return f"{first} (and {more} more)"
    return first


def explain_first(error: ValidationError | KeyError, inside: str = "") -> str:
    """The first problem as a clause: where, what, and what would be right. Where is left out if it
    is `inside`."""
    if isinstance(error, KeyError):
        return str(error.args[0])
    first = error.errors(include_url=False)[0]
    where = _location(first)
    if first["type"] == "missing":
        return f"'{shorten(where)}' is missing"
    message = _message(first)
    if where in ("", inside) or first["type"] == "space":
        return message
    where = f"'{shorten(where, 100)}'"
    if first["type"].startswith("unknown_"):
        return f"in {where}: {message}"
    return f"{where}: {message}"


def _location(problem: ErrorDetails) -> str:
    """The dotted path of the value, without what pydantic adds for a union."""
    parts = [str(part) for part in problem["loc"]]
    last = parts[-1] if parts else ""
    of_union = last in _UNION_TAGS or last.startswith("literal[")
    if len(parts) > 1 and of_union:
        parts.pop()
    return ".".join(parts)


def _message(problem: ErrorDetails) -> str:
    """What is wrong, in the words of a config, without secrets and without long values."""
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("valid dictionary", "mapping of keys to values")
    message = re.sub(r" or instance of \w+", "", message)
    message = redact(message[:1].lower() + message[1:])
    got = problem["input"]
    if isinstance(got, str):
        short = shorten(got)
        if short != got:
            message = message.replace(repr(got), repr(short)).replace(got, short)
    if problem["type"] in _COMPLETE:
        return message
    message = re.sub("^input should", "it should", message)
    if isinstance(got, str | int | float | bool | None):
        return f"{message}, and it is {shorten(repr(got))}"
    return message


_UNION_TAGS = ("int", "float", "bool", "str")
"""What pydantic adds to the location of a value that fits no member of a union."""

_COMPLETE = ("unknown_key", "unknown_name", "no_name", "space", "value_error")
"""Our own messages, which name the value where that helps."""
