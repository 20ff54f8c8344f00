"""Turns a trained sparse network into a smaller one with the same outputs."""

from trainables.compaction.compact import Compacted, Compaction, Report, compact
from trainables.compaction.plain import from_plain, to_plain

__all__ = ["Compacted", "Compaction", "Report", "compact", "from_plain", "to_plain"]
