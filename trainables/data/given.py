"""What a function of the user's gave: whether it is data, and of which kind."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimfront.trainables.data.normalise import is_image
from slimfront.trainables.errors import UserError


def kind_of(made: object) -> str:
    """The type of what came back; of a tuple, also the types in it."""
    if not isinstance(made, tuple):
        kind = type(made).__name__
        return f"of type {kind}"
    kinds = [type(part).__name__ for part in made]
    types = ", ".join(kinds)
    return f"a tuple of ({types})"


def is_usual(tensor: Tensor) -> bool:
    """Whether it is of a type that data sets store."""
    if is_image(tensor):
        return True
    return tensor.dtype in (torch.float32, torch.int64, torch.bool)


def are_examples(made: object) -> bool:
    """Whether it is inputs, targets and maybe groups."""
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        return False
    return _is_inputs(made[0])


def _is_inputs(made: object) -> bool:
    if isinstance(made, Mapping):
        parts = list(made.values())
    elif isinstance(made, tuple):
        parts = list(made)
    else:
        return _is_array(made)
    if not parts:
        return False
    return all(map(_is_array, parts))


def _is_array(made: object) -> bool:
    """Whether it is a tensor, an array, or a table of pandas."""
    if isinstance(made, Tensor | np.ndarray):
        return True
    return hasattr(made, "to_numpy")


def joined_targets(targets: list[Any]) -> Any:
    """The targets of several splits, one after the other."""
    are_tensors = all(isinstance(of_split, Tensor) for of_split in targets)
    if not are_tensors:
        arrays = list(map(np.asarray, targets))
        return np.concatenate(arrays)
    shapes = set()
    for of_split in targets:
        shape_of_one_target = tuple(of_split.shape[1:])
        shapes.add(shape_of_one_target)
    if len(shapes) > 1:
        in_order = sorted(shapes)
        shown = " and ".join(map(str, in_order))
        raise UserError(f"the splits have targets of different shapes, (N, …) of {shown}")
    return torch.cat(targets)
