"""What a search may be called, and which storage paths are buckets."""

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


def is_bucket(path: str) -> bool:
    """Whether a storage path names a bucket, such as `s3://bucket/searches`, and not a
    directory."""
    return "://" in path
