"""Dotted paths into a config: `training.lr`, and `penalties.node.layers["body.0"]` where a key has
dots itself."""

import re
from typing import Any

_PART = re.compile(r"""(?:^|\.)([^.\[\]"']+)|\["([^"]+)"\]|\['([^']+)'\]""")
_NEEDS_QUOTES = re.compile(r"""[.\[\]"']""")


def parts(path: str) -> tuple[str, ...]:
    """The keys that a path names, from the outermost on.

    Raises:
        KeyError: if it is no path; the sentence says what one looks like.
    """
    found = []
    place = 0
    while place < len(path):
        match = _PART.match(path, place)
        if match is None or path.startswith("."):
            break
        found.append(next(key for key in match.groups() if key is not None))
        place = match.end()
    if place < len(path) or not found:
        raise KeyError(
            f"'{path[:100]}' is no path; keys are divided by dots, and one that has dots itself is "
            'in quotes and brackets: penalties.node.layers["body.0"]'
        )
    return tuple(found)


def joined(keys: tuple[str, ...]) -> str:
    """The path that names these keys, with quotes only where one needs them."""
    path = ""
    for key in keys:
        if _NEEDS_QUOTES.search(key):
            quote = "'" if '"' in key else '"'
            path += f"[{quote}{key}{quote}]"
        elif path:
            path += f".{key}"
        else:
            path = key
    return path


def is_inside(path: str, section: str) -> bool:
    """Whether a path names something within a section, and not the section itself."""
    outer = parts(section)
    inner = parts(path)
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def spelt(path: object) -> Any:
    """A path with quotes only where a key needs them, so that it has one spelling; what is no text
    is left to others. Raises ValueError for a text that is no path."""
    if not isinstance(path, str):
        return path
    try:
        return joined(parts(path))
    except KeyError as error:
        raise ValueError(error.args[0]) from None
