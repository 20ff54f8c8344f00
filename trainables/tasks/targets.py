"""Targets as they come: numbers, whole ones, and what is wrong with others."""

import warnings
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.errors import UserError


def as_tensor(given: Any, task: str) -> Tensor:
    """Targets (N, …) as a tensor on the CPU.

    Raises:
        UserError: if they are not numbers, or there are none.
    """
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    _refuse_other_than_numbers(given, task)
    try:
        with warnings.catch_warnings():
            # Nothing writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            found = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = getattr(given, "dtype", type(given).__name__)
        raise UserError(f"targets of the task {task} are numbers, and these are {kind}") from None
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):
        found = found.long()  # torch can do little with these
    if not found.dim() or not len(found):
        raise UserError("there are no targets: the data has no examples")
    if found.is_floating_point():
        _refuse_not_finite(found)
    return found


def _refuse_not_finite(targets: Tensor) -> None:
    wrong = ~targets.isfinite()
    if not bool(wrong.any()):
        return
    first = int(wrong.nonzero()[0][0])
    raise UserError(f"the target of example {first} is NaN or infinite; leave it out")


def _refuse_other_than_numbers(given: Any, task: str) -> None:
    """Raises UserError for a list, or an array of objects, with something else among its numbers,
    and says where."""
    is_list = isinstance(given, list | tuple)
    holds_objects = str(getattr(given, "dtype", "")) == "object"
    if not is_list and not holds_objects:
        return
    for place, one in enumerate(given):
        if one is None:
            shown = "missing"
        elif isinstance(one, str):
            shown = f"'{one}'"
        else:
            continue
        raise UserError(
            f"the target of example {place} is {shown}, and the task {task} takes numbers here"
        )


def whole(targets: Tensor) -> bool:
    """Whether targets are whole numbers, of whatever type."""
    if targets.is_complex():
        return False
    if not targets.is_floating_point():
        return True
    return torch.equal(targets, targets.round())


def is_column(targets: Tensor) -> bool:
    """Whether they are (N, 1), as tables have them."""
    return targets.dim() == 2 and targets.shape[1] == 1
