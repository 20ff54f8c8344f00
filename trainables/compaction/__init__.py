"""Turns a trained sparse network into a smaller one with the same outputs."""

from slimfront.trainables.compaction.compact import compact
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.plain import deserialise, serialise
from slimfront.trainables.compaction.report import Compacted, Report

__all__ = ["Compacted", "Compaction", "Report", "compact", "deserialise", "serialise"]
