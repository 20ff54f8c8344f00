"""Turns a trained sparse network into a smaller one with the same outputs."""

from slimfront.trainables.compaction.compact import Compacted, Compaction, Report, compact
from slimfront.trainables.compaction.plain import deserialise, serialise

__all__ = ["Compacted", "Compaction", "Report", "compact", "deserialise", "serialise"]
