"""Plug-ins: modules of the user's that register penalties, sparsifiers, tasks, models and data
sets."""

import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line
from slimfront.trainables.importing import import_module

GROUP = "slimfront.plugins"
"""The entry points of installed packages that are plug-ins."""


def load_plugins(names: Iterable[str] = ()) -> None:
    """Imports the plug-ins of installed packages, and the modules of these names, once in a
    process.

    Raises:
        UserError: if one cannot be imported.
    """
    _load_installed()
    for name in names:
        _load(name)


@cache
def _load(name: str) -> ModuleType:
    return import_module(name, name, "plugins:")


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        try:
            importlib.import_module(point.value.partition(":")[0])
        except OF_USERS_CODE as error:
            raise UserError(
                f"the plug-in '{point.name}' ({point.value}), which is installed, cannot be "
                f"imported: {type(error).__name__}: {first_line(error)}"
            ) from error
