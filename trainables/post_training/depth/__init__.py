"""What whole layers are chosen by: each file has a criterion, or two that differ in a line."""

from slimfront.trainables.post_training.depth import entropy, loss, outputs, scales, similarity
from slimfront.trainables.post_training.depth.base import (
    CRITERIA,
    OUTPUTS,
    Criterion,
    find_criterion,
)

__all__ = [
    "CRITERIA",
    "OUTPUTS",
    "Criterion",
    "entropy",
    "find_criterion",
    "loss",
    "outputs",
    "scales",
    "similarity",
]
