"""Trains, compacts and measures one candidate network, with torch alone: no Ray, Optuna or MLflow.

`from trainables import Candidate, train, compact, measure` is all that a notebook needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfront.trainables.candidate import Candidate
    from slimfront.trainables.compaction import compact
    from slimfront.trainables.measures.measure import measure
    from slimfront.trainables.training.loop import train

__all__ = ["Candidate", "compact", "measure", "train"]

_HOMES = {
    "Candidate": "candidate",
    "compact": "compaction",
    "measure": "measures",
    "train": "training",
}
"""Imported when they are asked for, since a command that trains nothing need not wait for torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainables' has no attribute '{name}'")
    return getattr(importlib.import_module(f"trainables.{_HOMES[name]}"), name)
