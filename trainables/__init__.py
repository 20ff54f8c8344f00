"""Trains, compacts and measures one candidate network, with torch alone: no Ray, Optuna or MLflow.

`from trainables import Candidate, train, compact, measure` is all that a notebook needs.
"""

from trainables.candidate import Candidate
from trainables.compaction import compact
from trainables.measures import measure
from trainables.training import train

__all__ = ["Candidate", "compact", "measure", "train"]
