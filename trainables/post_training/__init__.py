"""Makes a trained network smaller without training it: pruning on a few batches, and compaction."""

from slimfront.trainables.post_training.amount import Amount
from slimfront.trainables.post_training.prune import check_criterion, prune, pruned

__all__ = ["Amount", "check_criterion", "prune", "pruned"]
