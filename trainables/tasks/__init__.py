"""Tasks by name: what a network is trained for. A new one is one file here with a class under
`@TASKS.register`."""

from slimfront.trainables.tasks.active import ActiveTask
from slimfront.trainables.tasks.base import TASKS, Encoded, Task
from slimfront.trainables.tasks.classification import Classification
from slimfront.trainables.tasks.factory import TaskFactory
from slimfront.trainables.tasks.metrics import Described, Metric, MetricOptions, Tally, Whole
from slimfront.trainables.tasks.multilabel import MultiLabel
from slimfront.trainables.tasks.regression import Regression
from slimfront.trainables.tasks.segmentation import Segmentation
from slimfront.trainables.tasks.sequence import SequenceClassification, TokenClassification

__all__ = [
    "TASKS",
    "ActiveTask",
    "Classification",
    "Described",
    "Encoded",
    "Metric",
    "MetricOptions",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "SequenceClassification",
    "Tally",
    "Task",
    "TaskFactory",
    "TokenClassification",
    "Whole",
]
