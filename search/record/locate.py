"""Which search is meant by what was typed: its name, or a path that leads to it."""

from pathlib import Path

from slimfront.search.config.names import is_bucket, is_name
from slimfront.trainables.errors import UserError, shorten

JOURNAL_FILE = "journal.jsonl"
"""What makes a directory that of a search."""


def locate(search: str, storage_path: str) -> tuple[str, str]:
    """The name of a search and the storage path that it is in.

    MLflow and the study know a search by its name, so that another way to its directory
    (`runs/../NAME`, `NAME/`, a link) must lead to the same name: under a second one they would
    begin a second record.

    Args:
        search: its name, or the path of its directory, from the working directory or from
            `storage_path`.
        storage_path: a directory or a bucket.

    Raises:
        UserError: if it is neither.
    """
    name = search.rstrip("/")
    if is_bucket(storage_path):
        if is_name(name):
            return name, storage_path
        raise _no_search(search)
    paths = [Path(storage_path, search)]
    if not is_name(search):
        paths.append(Path(search))
    for path in paths:
        try:
            directory = path.resolve()
            if is_name(directory.name) and (directory / JOURNAL_FILE).is_file():
                return directory.name, str(directory.parent)
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a circle of links
            continue
    if is_name(name):
        return name, storage_path  # there is none; the caller says which there are
    raise _no_search(search)


def name_in_store(search: str) -> str:
    """The name by which MLflow or a cluster knows a search, which may lie elsewhere: of `NAME`,
    `NAME/`, or a path to it here."""
    name = search.rstrip("/")
    if is_name(name):
        return name
    found, _ = locate(search, ".")
    return found


def _no_search(search: str) -> UserError:
    return UserError(
        f"'{shorten(search)}' is neither the name of a search nor the path of its directory; give "
        "the name it was begun with, "
        "and --storage-path where it is not kept in runs"
    )
