"""What a search may be called."""

import re

from slimfront.trainables.errors import UserError, shorten

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
BAD_NAME = "'{name}' cannot name a directory; use up to 100 letters, digits, '.', '_' and '-'"


def is_name(text: str) -> bool:
    """Whether a search can be called so."""
    return re.fullmatch(_NAME, text) is not None


def check_name(name: str) -> None:
    """Raises UserError if a search cannot be called so."""
    if not is_name(name):
        raise UserError(f"--name: {BAD_NAME.format(name=shorten(name))}")
