"""Packs: many candidates of one architecture trained at once, in one process, with the results that each has alone."""

from trainables.packs.pack import Pack
from trainables.packs.packable import pack_key, packable

__all__ = ["Pack", "pack_key", "packable"]
