"""Data sets and loaders of torch, read into tensors once."""

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line

_BATCH = 256
_TRIES = 8
_TARGETS = ("labels", "label", "targets", "target")
"""The keys of a batch that is a mapping under which its targets may be."""

log = logging.getLogger(__name__)


def is_torch_data(made: object) -> bool:
    """Whether it is a data set or a loader of torch."""
    return isinstance(made, TorchDataset | DataLoader)


def read_all(given: Any, what: str, *, seed: int = 0, ignore: int | None = None) -> tuple[Any, Any]:
    """All examples of a data set or a loader of torch: inputs and targets.

    Batches that were padded to different lengths are padded to the longest: inputs with zeros,
    targets with `ignore`. What a data set draws at random is drawn once, here, which is warned of;
    with the same `seed` every process draws the same.

    Raises:
        UserError: if a batch is not inputs and targets, or targets would have to be padded and
            `ignore` is None; `what` begins the message.
    """
    with _seeded(seed):
        _warn_of_random(given, what)
    with _seeded(seed):
        return _read_all(given, what, ignore)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All that draws random numbers begins at `seed`, and goes on afterwards as before."""
    python = random.getstate()
    numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _read_all(given: Any, what: str, ignore: int | None) -> tuple[Any, Any]:
    if isinstance(given, DataLoader) and given.drop_last:
        log.warning("%s leaves out the last examples of an epoch (drop_last)", what)
    inputs = []
    targets = []
    try:
        for batch in _batches(given):
            x, y = pair(batch, what)
            inputs.append(x)
            targets.append(y)
        if not inputs:
            raise UserError(f"{what} has no examples")
        together = _together(inputs, what)
        if all(map(_are_names, targets)):
            names = list(chain.from_iterable(targets))
            return together, names
        return together, _stacked_targets(targets, what, ignore)
    except UserError:
        raise
    except OF_USERS_CODE as error:
        kind = type(error).__name__
        reason = first_line(error)
        if "equal size" in reason:  # torch's words, of examples that make no batch
            raise UserError(
                f"{what} gives examples of different shapes, which make no batch; pad them in the "
                "dataset, or return a torch.utils.data.DataLoader whose collate_fn pads each "
                "batch, with a mask where the network takes one"
            ) from error
        raise UserError(f"{what} raised {kind}: {reason}") from error


def _are_names(targets: Any) -> bool:
    return all(isinstance(one, str) for one in targets)


def _stacked_targets(parts: list[Any], what: str, ignore: int | None) -> Tensor:
    parts = list(map(torch.as_tensor, parts))
    if ignore is not None:
        return _stacked(parts, what, ignore)
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise UserError(
            f"{what} gives batches with targets of different shapes, which this task cannot pad"
        )
    return _stacked(parts, what)


def _batches(given: Any) -> Iterator[Any]:
    loader = given
    if not isinstance(given, DataLoader):
        loader = DataLoader(given, batch_size=_BATCH)
    return iter(loader)


def _warn_of_random(given: Any, what: str) -> None:
    one = given
    if isinstance(given, DataLoader):
        one = given.dataset
    if isinstance(one, IterableDataset):
        return
    try:
        first, *others = [one[0] for _ in range(_TRIES)]
        varies = any(not _same(first, other) for other in others)
    except Exception:  # whatever it raises is told where all are read
        return
    if varies:
        log.warning(
            "%s draws its examples at random: they are read once, so that each stays as it was "
            "drawn; use data.augment for images",
            what,
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor):
            return False
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        pairs = [(one[key], other[key]) for key in one]
    elif isinstance(one, tuple | list):
        pairs = list(zip(one, other, strict=True))
    else:
        equal = one == other
        return bool(equal)
    return all(_same(*pair) for pair in pairs)


def pair(batch: Any, what: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Raises:
        UserError: if it is neither a mapping with targets, nor inputs and targets in a row; `what`
            begins the message.
    """
    if isinstance(batch, Mapping):
        return _named_pair(batch, what)
    in_row = isinstance(batch, tuple | list)
    if not in_row or len(batch) < 2:
        kind = type(batch).__name__
        raise UserError(f"{what} gives a {kind}; each example is (inputs, target)")
    *several, targets = batch
    if len(several) == 1:
        inputs = several[0]
        return inputs, targets
    return tuple(several), targets


def _named_pair(batch: Mapping[Any, Any], what: str) -> tuple[Any, Any]:
    inputs = dict(batch)
    present = [key for key in _TARGETS if key in inputs]
    alone = len(inputs) == 1
    if alone or not present:
        names = ", ".join(map(str, batch))
        raise UserError(f"{what} gives mappings with {names}; one key is to be 'targets'")
    key = present[0]
    targets = inputs.pop(key)
    return inputs, targets


def _together(parts: list[Any], what: str) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        named = {}
        for name in first:
            of_name = [part[name] for part in parts]
            named[name] = _stacked(of_name, what)
        return named
    if isinstance(first, tuple | list):
        placed = []
        for place in range(len(first)):
            of_place = [part[place] for part in parts]
            placed.append(_stacked(of_place, what))
        return tuple(placed)
    return _stacked(parts, what)


def _stacked(parts: list[Tensor], what: str, fill: int = 0) -> Tensor:
    """The rows of all parts; those that are shorter in one axis are padded with `fill`."""
    parts = list(map(torch.as_tensor, parts))
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return torch.cat(parts)
    numbers_of_axes = {len(shape) for shape in shapes}
    if len(numbers_of_axes) != 1:
        raise UserError(f"{what} gives tensors of different numbers of axes")
    sizes_by_axis = zip(*shapes, strict=True)
    longest = list(map(max, sizes_by_axis))
    padded = [_padded(part, longest, fill) for part in parts]
    return torch.cat(padded)


def _padded(part: Tensor, longest: list[int], fill: int) -> Tensor:
    """The rows (n, …) of a part in the shape (n, *longest), `fill` after what each has."""
    rows = len(part)
    whole_shape = (rows, *longest)
    padded = part.new_full(whole_shape, fill)
    filled = tuple(slice(size) for size in part.shape)
    padded[filled] = part
    return padded
