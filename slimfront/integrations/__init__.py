"""Slimming in the trainers of other libraries: `slimfront.integrations.lightning` and
`slimfront.integrations.transformers`, each of which needs its library (`pip install
slimfront[lightning]`, `slimfront[transformers]`)."""

import importlib
from types import ModuleType

_LIBRARIES = ("lightning", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name not in _LIBRARIES:
        raise AttributeError(f"module 'slimfront.integrations' has no attribute '{name}'")
    return importlib.import_module(f"slimfront.integrations.{name}")
