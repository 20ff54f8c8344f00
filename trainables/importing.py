"""Finds what a config names by import path."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from slimfront.trainables.errors import OF_USERS_CODE, UserError
from slimfront.trainables.options import suggest


def import_by_path(path: str, what: str) -> Callable[..., Any]:
    """The callable at `package.module:name`; the working directory is searched too, after Python's
    own path.

    Args:
        path: such as `my_package.data:flowers`; the name may have dots (`module:Class.method`).
        what: what it is for, to begin messages with, such as "data factory".

    Raises:
        UserError: if the path has another form, its module cannot be imported, or it does not name
            a callable.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not all(
        part.isidentifier() for part in [*module_name.split("."), *name.split(".")]
    ):
        raise UserError(
            f"{what} '{path}': an import path has the form package.module:name, such as "
            "my_data:load"
        )
    target: Any = import_module(module_name, path, what)
    for part in name.split("."):
        if not hasattr(target, part):
            names = [known for known in dir(target) if not known.startswith("_")]
            raise UserError(f"{what} '{path}': there is no '{part}' in it; {suggest(part, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise UserError(
            f"{what} '{path}': it is a {type(target).__name__}, and it must be a function or a "
            "class to call"
        )
    return target  # type: ignore[no-any-return]


def import_module(name: str, path: str, what: str) -> ModuleType:
    """The module `name`; `what` and `path` begin messages.

    Raises:
        UserError: if it cannot be imported.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        # As `python -m` does; a console script has its own directory there instead. Left in, for
        # imports made later.
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what} '{path}': there is no module '{error.name}' in Python's path or in the "
                f"working directory {here}"
            ) from None
        raise UserError(f"{what} '{path}': its module cannot be imported: {error}") from error
    except OF_USERS_CODE as error:
        raise UserError(
            f"{what} '{path}': its module cannot be imported: {type(error).__name__}: {error}"
        ) from error
