"""Sparsifiers by name. A new one is one file here with a class under `@SPARSIFIERS.register`."""

from trainables.sparsifiers.base import SPARSIFIERS, ActiveSparsifier, Sparsifier
from trainables.sparsifiers.magnitude import Magnitude

__all__ = ["SPARSIFIERS", "ActiveSparsifier", "Magnitude", "Sparsifier"]
