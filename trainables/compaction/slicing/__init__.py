"""Taking units out of a traced network: out of its parameters, the settings of its layers, and the
sizes in its code."""

from slimfront.trainables.compaction.slicing.tries import sliced

__all__ = ["sliced"]
