"""The traced network that is made compact: of plain modules, and in training mode what the model is
in training mode."""

from slimfront.trainables.compaction.modes.both_modes import traced_in_both_modes

__all__ = ["traced_in_both_modes"]
