"""Targets that are one class for each example: as they come, and as numbers from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.tasks.base import Encoded
from slimfront.trainables.tasks.targets import as_tensor, is_column, whole

_MOST_SHOWN = 6


def encode_classes(
    given: Any, task: str, names: Sequence[str] = (), classes: int | None = None
) -> Encoded:
    """Classes as they came, as numbers from 0.

    Names, numbers that begin elsewhere than at 0, and any two numbers are mapped, and what each
    output stands for is kept. Of rows with a 1 for the class and 0 for all others, the place of the
    1 is taken.

    Args:
        given: (N,) or (N, 1) whole numbers, whole floats, booleans or strings, or (N, classes) with
            one 1 in each row.
        names: of the classes from 0, where the data set has them.
        classes: how many there are, where it is known.

    Raises:
        UserError: if they are none of that, or leave out a number between the others.
    """
    strings = _strings(given)
    if strings is not None:
        return _of_names(strings, classes)
    numbers = as_tensor(given, task)
    targets = _whole(numbers, task)
    known = classes or len(names)
    if known:
        return _of_known_number(targets, names, known)
    return _renumbered(targets)


def _of_names(strings: list[str], classes: int | None) -> Encoded:
    """Names as numbers, in the order of the alphabet."""
    distinct = set(strings)
    names = tuple(sorted(distinct))
    places = {}
    for place, name in enumerate(names):
        places[name] = place
    numbers = [places[name] for name in strings]
    targets = torch.tensor(numbers, dtype=torch.int64)
    return _checked(targets, names, classes)


def _of_known_number(targets: Tensor, names: Sequence[str], count: int) -> Encoded:
    """Numbers in 0 … count − 1 as they are."""
    numbers = targets.unique().tolist()
    if len(numbers) < 2:
        raise _one_class_only()
    least = numbers[0]
    largest = numbers[-1]
    if least < 0 or largest >= count:
        raise UserError(
            f"the data has targets from {least} to {largest}, and {count} classes; they are "
            f"numbers in 0 … {count - 1}"
        )
    if len(names) != count:
        return Encoded(targets, count)
    return Encoded(targets, count, tuple(names))


def _renumbered(targets: Tensor) -> Encoded:
    """Numbers from 0, where they began elsewhere, or are any two."""
    values = targets.unique()
    numbers = values.tolist()
    least = numbers[0]
    largest = numbers[-1]
    span = largest - least + 1
    together = len(numbers) == span
    if least == 0 and together:
        return _checked(targets, (), None)
    if not together and len(numbers) != 2:
        known = set(numbers)
        missing = next(n for n in range(least, largest) if n not in known)
        raise UserError(
            f"the data has classes from {least} to {largest}, and no example of {missing}; number "
            f"them without a gap, or set task.classes to {largest + 1} for an output each; where "
            "they are amounts, set task: regression"
        )
    names = tuple(map(str, numbers))
    places = torch.searchsorted(values, targets)
    return _checked(places, names, None)


def _checked(targets: Tensor, names: tuple[str, ...], classes: int | None) -> Encoded:
    numbers = targets.unique().tolist()
    count = len(names)
    if not names:
        largest = numbers[-1]
        count = largest + 1
    if classes is not None and classes != count:
        shown = first_few(names, _MOST_SHOWN)
        raise UserError(f"task.classes is {classes}, and the data has {count} ({shown})")
    if count < 2 or len(numbers) < 2:
        raise _one_class_only()
    return Encoded(targets, count, names)


def _one_class_only() -> UserError:
    return UserError("all examples have one and the same class; there must be two or more")


def _strings(given: Any) -> list[str] | None:
    """The targets, if they are strings.

    Raises:
        UserError: if only some are.
    """
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    is_table_column = all(map(_is_cell, values))
    if is_table_column:
        values = [value for (value,) in values]
    strings = [isinstance(value, str) for value in values]
    if not any(strings):
        return None
    if all(strings):
        return values
    first = strings.index(False)
    other = values[first]
    raise UserError(
        f"the target of example {first} is {other!r}, and others are names; leave it "
        "out, or give it a name"
    )


def _is_cell(value: object) -> bool:
    """Whether it is a row of one column."""
    return isinstance(value, list) and len(value) == 1


def is_one_hot(targets: Tensor) -> bool:
    """Whether targets (N, classes, …) are 1 in one place of the second axis, and 0 elsewhere."""
    if targets.dim() < 2 or targets.is_complex():
        return False
    if targets.shape[1] < 2:
        return False
    known = (targets == 0) | (targets == 1)
    if not bool(known.all()):
        return False
    ones = targets.long().sum(1)
    one_each = ones == 1
    return bool(one_each.all())


def _whole(targets: Tensor, task: str) -> Tensor:
    if is_column(targets):
        targets = targets.squeeze(1)
    if is_one_hot(targets):
        targets = targets.long().argmax(1)
    if targets.dim() != 1 or targets.is_complex():
        shape = tuple(targets.shape)
        advice = ""
        if targets.dim() == 2:
            advice = "; for several classes an example, set task: multilabel"
        raise UserError(
            f"the data has targets of shape {shape} and type {targets.dtype}; the "
            f"task {task} takes one whole number for each example, (N,){advice}"
        )
    if not whole(targets):
        broken = targets != targets.round()
        first = int(broken.nonzero()[0])
        value = float(targets[first])
        raise UserError(
            f"the target of example {first} is {value:g}; the task {task} takes "
            "whole numbers or names; for numbers, set task: regression"
        )
    return targets.long()
