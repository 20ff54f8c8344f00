"""What whole layers are chosen by, each criterion a file, and how those that are chosen go."""

from slimfront.trainables.depth import entropy, loss, outputs, scales, similarity
from slimfront.trainables.depth.base import (
    CRITERIA,
    OUTPUTS,
    Batch,
    Criterion,
    Loss,
    find_criterion,
)
from slimfront.trainables.depth.closing import LEAST_EPOCHS, Closing, prepared
from slimfront.trainables.depth.options import Depth
from slimfront.trainables.depth.shallower import shallower

__all__ = [
    "CRITERIA",
    "LEAST_EPOCHS",
    "OUTPUTS",
    "Batch",
    "Closing",
    "Criterion",
    "Depth",
    "Loss",
    "entropy",
    "find_criterion",
    "loss",
    "outputs",
    "prepared",
    "scales",
    "shallower",
    "similarity",
]
