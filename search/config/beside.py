"""Where modules that a config names by import path are found, beside the working directory."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

_FOUND: list[str] = []
"""The folders whose modules this process finds."""


def find_beside(config: Path) -> None:
    """Has modules found that lie beside the config, here and in the processes that a Ray of our own
    starts."""
    try:
        beside = str(config.resolve().parent)
    except (OSError, RuntimeError, ValueError):  # links in a circle, say: told where it is read
        return
    find_in([beside])


def find_in(folders: Iterable[str]) -> None:
    """Has modules found in these folders, after everywhere else; those that are not on this machine
    are left out."""
    for folder in folders:
        if not Path(folder).is_dir():
            continue
        if folder not in _FOUND:
            _FOUND.append(folder)
        if folder not in sys.path:
            sys.path.append(folder)
        listed = os.environ.get("PYTHONPATH", "")
        paths = [path for path in listed.split(os.pathsep) if path]
        if folder not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join([*paths, folder])


def found_in() -> list[str]:
    """The folders in which modules are found because a config lies there: a search records them."""
    return list(_FOUND)
