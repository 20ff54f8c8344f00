"""Packs: many candidates of one architecture trained at once, in one process, with the results that
each has alone."""

from slimfront.trainables.packs.calibrate import best_size
from slimfront.trainables.packs.pack import Pack
from slimfront.trainables.packs.packable import pack_key, packable

__all__ = ["Pack", "best_size", "pack_key", "packable"]
