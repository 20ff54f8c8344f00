"""The data are looked at once, before anything else: what would show later, as something else, is
said at once."""

import functools
import logging

import torch
from torch import Tensor

from slimfront.trainables.data.base import Data, Dataset
from slimfront.trainables.data.cache import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import tensors
from slimfront.trainables.tasks import Task

log = logging.getLogger(__name__)

_SPLITS = ("train", "validation", "test")
_PIECE = 2**24
"""So many numbers are looked at at once."""


@functools.lru_cache(maxsize=4)
def looked_at(options: Data, device: torch.device, task: Task | None = None) -> Dataset:
    """The data set of these options, as `load_once` gives it, after a look at it: `check_data`."""
    data = load_once(options, device, task)
    check_data(data)
    return data


def check_data(data: Dataset) -> None:
    """Looks at all inputs and targets.

    Raises:
        UserError: if an input is NaN or infinite. What the task finds odd about the targets is a
            warning.
    """
    for name in _SPLITS:
        for inputs in tensors(getattr(data, name).inputs).values():
            _refuse_no_numbers(inputs, name)
    others = {name: getattr(data, name).targets for name in _SPLITS[1:]}
    for warning in data.task.options.warnings(data.train.targets, others):
        log.warning("%s", warning)


def _refuse_no_numbers(inputs: Tensor, name: str) -> None:
    for first in range(0, len(inputs), step := max(1, _PIECE // max(inputs[0].numel(), 1))):
        part = inputs[first : first + step]
        if part.is_floating_point() and not bool(part.isfinite().all()):
            wrong = ~part.flatten(1).isfinite()
            example = int(wrong.any(1).nonzero()[0])
            raise UserError(
                f"the data: input {first + example} of {name} has NaN or infinite numbers "
                f"({int(wrong[example].sum())} of "
                f"{wrong.shape[1]}), or so have those that it was standardised with; leave "
                "such examples out, or fill them in"
            )
