"""Proposes, schedules and records candidates: the only place that knows Optuna and MLflow.

The package can be called: `slimfront.search(config)` runs a search (see `python_api.search`),
though `slimfront.search` is also where that is written. A function of that name would hide the
package, or be hidden by it, by the order of imports.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from slimfront.search.python_api import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
