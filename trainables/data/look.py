"""The data are looked at once, before anything else: what would show later, as something else, is
said at once."""

import functools
import logging

import torch

from slimfront.trainables.data.base import Data, Dataset
from slimfront.trainables.data.cache import load_once
from slimfront.trainables.data.finite import refuse_no_numbers
from slimfront.trainables.inputs import described
from slimfront.trainables.tasks import Task

log = logging.getLogger(__name__)

_SPLITS = ("train", "validation", "test")
_GIVEN = "by given constants"
"""As `normalised` calls constants of the user's."""


@functools.lru_cache(maxsize=4)
def looked_at(options: Data, device: torch.device, task: Task | None = None) -> Dataset:
    """The data set of these options, as `load_once` gives it, after a look at it: `check_data`."""
    data = load_once(options, device, task)
    check_data(data)
    return data


def check_data(data: Dataset) -> None:
    """Looks at all inputs and targets, and says once how the inputs are normalised.

    Raises:
        UserError: if an input is NaN or infinite. What the task finds odd about the targets is a
            warning.
    """
    for name in _SPLITS:
        refuse_no_numbers(
            getattr(data, name).inputs,
            f" of {name}",
            ", or so have those that it was standardised with",
        )
    others = {name: getattr(data, name).targets for name in _SPLITS[1:]}
    how = f"normalised ({data.normalised}) by the training split"
    if data.normalised == "none":
        how = "taken as they are (data.normalise)"
    elif data.normalised == _GIVEN:
        how = f"normalised {_GIVEN}"
    _say_once(f"Inputs, {described(data.train.inputs)}, are {how}.")
    for warning in data.task.options.warnings(data.train.targets, others):
        log.warning("%s", warning)


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    log.info("%s", text)
