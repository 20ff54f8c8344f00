"""What the processes of a node share: data sets, and what teachers make of them."""

from slimfront.trainables.data.cache.datasets import (
    files_state,
    load_once,
    load_shared,
    memory_bytes,
)
from slimfront.trainables.data.cache.entries import FOLDER, LIMIT
from slimfront.trainables.data.cache.outputs import outputs_once

__all__ = [
    "FOLDER",
    "LIMIT",
    "files_state",
    "load_once",
    "load_shared",
    "memory_bytes",
    "outputs_once",
]
