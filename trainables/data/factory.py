"""Data from a function of the user's, by import path."""

import copy
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor

from slimfront.trainables.data.base import DATA, Data, Dataset, split
from slimfront.trainables.data.cache import files_state
from slimfront.trainables.data.tensor_file import Allocator, in_process
from slimfront.trainables.data.transforms import channel_statistics
from slimfront.trainables.errors import UserError
from slimfront.trainables.importing import import_by_path

SESSION = "SLIMFRONT_SESSION"
"""The environment variable that the processes of one search share: what a factory returns is the
same for all of them."""


@DATA.register("factory")
class Factory(Data):
    """What the callable at the import path `factory` (`package.module:function`) returns for the
    keyword arguments `args`.

    It returns a `Dataset`, which is taken as it is split, or `(inputs, labels)`, tensors or arrays,
    which are split by
    `validation`, `test` and `seed`. Images as uint8 (N, channels, height, width) stay uint8; all
    else becomes float32.
    """

    name: Literal["factory"] = "factory"
    factory: str
    args: dict[str, JsonValue] = Field(default_factory=dict)

    def __hash__(self) -> int:
        # A dict has no hash. The values may stay out of it: what compares equal must only hash
        # alike.
        return hash(
            (
                self.factory,
                frozenset(self.args),
                self.validation,
                self.test,
                self.seed,
                self.augment,
            )
        )

    def load(self, allocate: Allocator = in_process) -> Dataset:
        function = import_by_path(self.factory, "data factory")
        try:
            # What it does to them must not reach these options.
            made = function(**copy.deepcopy(self.args))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"data factory '{self.factory}' raised {type(error).__name__}: {error}"
            ) from error
        if isinstance(made, Dataset):
            return self._checked(made)
        if (
            isinstance(made, tuple)
            and len(made) == 2
            and all(isinstance(part, Tensor | np.ndarray) for part in made)
        ):
            inputs, labels = self._as_inputs(made[0]), self._as_labels(made[1])
            if len(inputs) != len(labels):
                raise self._wrong(
                    f"has {len(inputs)} inputs and {len(labels)} labels", "one label for each input"
                )
            return split(self, inputs, labels, classes=int(labels.max()) + 1, allocate=allocate)
        raise self._wrong(
            f"is {_describe(made)}",
            "a slimfront.trainables.data.Dataset, or (inputs, labels) as tensors or arrays",
        )

    def fingerprint(self) -> str | None:
        """Of the module's file, for the processes of one search: what else the function reads
        cannot be told.

        None without a search, or where the function does not come from a file.
        """
        session = os.environ.get(SESSION)
        import_by_path(self.factory, "data factory")
        file = getattr(sys.modules[self.factory.partition(":")[0]], "__file__", None)
        return (
            f"{session} {files_state([Path(file)])}"
            if session and file and Path(file).is_file()
            else None
        )

    def _as_inputs(self, given: Tensor | np.ndarray[Any, Any]) -> Tensor:
        inputs = self._tensor(given, "inputs")
        if inputs.ndim < 2 or inputs.is_complex() or not inputs.numel():
            shape = tuple(inputs.shape)
            raise self._wrong(
                f"has inputs of shape {shape} and type {inputs.dtype}",
                "real numbers of shape (examples, …)",
            )
        return inputs

    def _as_labels(self, given: Tensor | np.ndarray[Any, Any]) -> Tensor:
        labels = self._tensor(given, "labels")
        if (
            labels.ndim != 1
            or labels.is_floating_point()
            or labels.is_complex()
            or not len(labels)
            or int(labels.min()) < 0
        ):
            shape = tuple(labels.shape)
            raise self._wrong(
                f"has labels of shape {shape} and type {labels.dtype}",
                "class numbers from 0, whole, of shape (examples,)",
            )
        return labels.long()

    def _tensor(self, given: Tensor | np.ndarray[Any, Any], part: str) -> Tensor:
        try:
            with warnings.catch_warnings():
                # Nothing writes to it.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                return torch.as_tensor(given).detach().cpu()
        except TypeError:
            raise self._wrong(
                f"has {part} that are an array of {getattr(given, 'dtype', '?')}", "numbers"
            ) from None

    def _checked(self, data: Dataset) -> Dataset:
        """The data set, on the CPU, with what a network needs of it checked."""
        for name in ("train", "validation", "test"):
            inputs, labels = getattr(data, name)
            if (
                tuple(inputs.shape[1:]) != data.input_shape
                or len(inputs) != len(labels)
                or not len(labels)
            ):
                raise self._wrong(
                    (
                        f"has a split '{name}' of shape {tuple(inputs.shape)} with "
                        f"{len(labels)} labels"
                    ),
                    f"examples of the shape {data.input_shape}, with one label each",
                )
            if (
                labels.dtype != torch.int64
                or int(labels.min()) < 0
                or int(labels.max()) >= data.classes
            ):
                raise self._wrong(
                    f"has labels in '{name}' that are not int64 in 0 … {data.classes - 1}", "that"
                )
            images = inputs.dtype == torch.uint8 and inputs.ndim == 4
            if inputs.dtype != data.train.inputs.dtype or not (
                images or inputs.dtype == torch.float32
            ):
                raise self._wrong(
                    f"has inputs of {inputs.dtype} in '{name}'",
                    "float32, or uint8 images (N, channels, height, width), in all",
                )
        data = data.to(torch.device("cpu"))
        if data.train.inputs.dtype == torch.uint8 and (data.mean is None or data.std is None):
            mean, std = channel_statistics(data.train.inputs)
            return replace(data, mean=mean, std=std)
        return data

    def _wrong(self, what: str, right: str) -> UserError:
        return UserError(
            f"what the data factory '{self.factory}' returned {what}; right would be {right}"
        )


def _describe(made: object) -> str:
    """The type of what came back; of a tuple, also the types in it."""
    if isinstance(made, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in made)})"
    return f"of type {type(made).__name__}"
