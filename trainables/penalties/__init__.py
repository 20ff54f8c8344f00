"""Penalties by name. A new one is one file here with a class under `@PENALTIES.register`."""

from trainables.penalties.base import PENALTIES, ActivePenalty, Penalty
from trainables.penalties.cka import CKA
from trainables.penalties.layer import LayerSparsity

__all__ = ["CKA", "PENALTIES", "ActivePenalty", "LayerSparsity", "Penalty"]
