"""Puts values into Markdown as what they are: text, and neither markup nor HTML.

Names and values come from configs, data and networks, and who reads a page may not be who wrote
them.
"""

import re

from slimfront.trainables.errors import one_line

_LONGEST = 200
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", ":": "&#58;"}
"""Characters that no Markdown takes for its own in this form; a colon makes links of addresses."""
_ESCAPED = "\\`*_[]()#!~$"
"""Those that stand for themselves behind a backslash."""


def text(value: object) -> str:
    """A value as text on one line, also in a cell of a table."""
    shown = ""
    for character in one_line(str(value), _LONGEST):
        escaped = f"\\{character}" if character in _ESCAPED else character
        shown += _ENTITIES.get(character, escaped)
    return shown


def code(value: object, *, cell: bool = False) -> str:
    """A value as code on one line; `cell` where it stands in a table, in which a pipe ends a cell
    even within code."""
    shown = one_line(str(value), _LONGEST) or " "
    runs = re.findall("`+", shown)
    longest = max(map(len, runs), default=0)
    fence = "`" * (longest + 1)
    blank = ""
    if runs:
        blank = " "
    quoted = f"{fence}{blank}{shown}{blank}{fence}"
    if cell:
        return quoted.replace("|", "\\|")
    return quoted
