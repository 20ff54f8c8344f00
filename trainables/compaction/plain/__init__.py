"""A compact network as plain data and tensors, so that a checkpoint loads with `weights_only=True`
and no pickled code."""

from slimfront.trainables.compaction.plain.arguments import Plain
from slimfront.trainables.compaction.plain.checking import check_plain
from slimfront.trainables.compaction.plain.networks import FORMAT, deserialise, serialise

__all__ = ["FORMAT", "Plain", "check_plain", "deserialise", "serialise"]
