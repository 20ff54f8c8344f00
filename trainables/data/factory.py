"""Data from a function of the user's, by import path."""

import copy
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor

from slimfront.trainables.data.base import (
    CLASSIFICATION,
    DATA,
    Data,
    Dataset,
    Split,
    attach,
    encoded_dataset,
    hold_out,
    split,
)
from slimfront.trainables.data.cache import files_state
from slimfront.trainables.data.finite import refuse_no_numbers
from slimfront.trainables.data.loaders import is_torch_data, read_all
from slimfront.trainables.data.normalise import is_image, stored_type
from slimfront.trainables.data.tensor_file import Allocator, in_process
from slimfront.trainables.data.transforms import channel_statistics
from slimfront.trainables.errors import UserError
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.inputs import Several, described, each, shape_of_one, tensors
from slimfront.trainables.tasks import Task

_SPLITS = ("train", "validation", "test")

SESSION = "SLIMFRONT_SESSION"
"""The environment variable that the processes of one search share: what a factory returns is the
same for all of them."""


@DATA.register("factory")
class Factory(Data):
    """What the callable at the import path `factory` (`package.module:function`) returns for the
    keyword arguments `args`.

    It returns `(inputs, targets)` or `(inputs, targets, groups)`, which are divided by `division`,
    `validation`, `test` and `seed`; or splits of its own: `{"train": (inputs, targets), "test": …,
    "validation": …}`, of which those that are left out are held out of the training examples; or a
    `Dataset`, which is taken as it is, normalised already. In place of `(inputs, targets)` it may
    be a data set or a loader of torch, which is read once.

    Inputs are a tensor or an array, or several: a mapping, of which the network's forward takes
    each by its name, or a tuple, by their places. Images as uint8 (N, channels, height, width) stay
    uint8, whole numbers stay whole, and truths bool; all else becomes float32. Targets are what the
    task takes.
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

    def load(self, task: Task = CLASSIFICATION, allocate: Allocator = in_process) -> Dataset:
        made = self._made()
        if isinstance(made, Dataset):
            return self._checked(made, task)
        if isinstance(made, Mapping) and "train" in made:
            read = {name: self._read(one, task) for name, one in made.items()}
            return self._of_splits(read, task)
        made = self._read(made, task)
        if not _are_examples(made):
            raise self._wrong(
                f"is {_describe(made)}",
                "a slimfront.trainables.data.Dataset, or (inputs, targets) as tensors or arrays",
            )
        inputs, targets = self._pair(made[:2])
        groups = None
        if len(made) == 3:
            groups = self._groups(made[2], len(inputs))
        return split(
            options=self, task=task, inputs=inputs, given=targets, allocate=allocate, groups=groups
        )

    def _read(self, given: Any, task: Task) -> Any:
        """Data sets and loaders of torch as inputs and targets; all else as it is."""
        if not is_torch_data(given):
            return given
        what = f"what the data factory '{self.factory}' returned"
        ignore = getattr(task, "ignore", None)
        return read_all(given, what, seed=self.seed, ignore=ignore)

    def _made(self) -> Any:
        function = import_by_path(self.factory, "data factory")
        try:
            # What it does to them must not reach these options.
            return function(**copy.deepcopy(self.args))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"data factory '{self.factory}' raised {type(error).__name__}: {error}"
            ) from error

    def _pair(self, given: Any) -> tuple[Tensor, Any]:
        """Inputs as tensors, and as many targets as they came."""
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise self._wrong(f"has a split that is {_describe(given)}", "(inputs, targets)")
        inputs = self._as_inputs(given[0])
        targets = given[1]
        count: int | str = "no"
        if hasattr(targets, "__len__"):
            count = len(targets)
        if count != len(inputs):
            raise self._wrong(
                f"has {len(inputs)} inputs and {count} targets",
                "one target for each input",
            )
        return inputs, targets

    def _groups(self, given: Any, examples: int) -> Tensor:
        """Groups (N,) as whole numbers, whatever they are called."""
        names = given.tolist() if hasattr(given, "tolist") else list(given)
        if len(names) != examples:
            raise self._wrong(f"has {examples} inputs and {len(names)} groups", "a group for each")
        known: dict[Any, int] = {}
        numbers = []
        for name in names:
            number = known.setdefault(name, len(known))
            numbers.append(number)
        return torch.tensor(numbers)

    def _of_splits(self, made: Mapping[str, Any], task: Task) -> Dataset:
        """The user's own splits; what is left out is held out of the training examples."""
        unknown = set(made) - set(_SPLITS)
        if unknown:
            names = ", ".join(map(str, made))
            raise self._wrong(f"has splits {names}", "train, validation and test")
        inputs: dict[str, Tensor] = {}
        given: dict[str, Any] = {}
        for name in _SPLITS:
            if name not in made:
                continue
            own_inputs, own_targets = self._pair(made[name])
            inputs[name] = own_inputs
            given[name] = own_targets
        for name, of_split in inputs.items():
            refuse_no_numbers(of_split, f" of {name}")
        all_targets = _joined(list(given.values()))
        encoded = task.encode(all_targets)
        sizes = [len(of_split) for of_split in inputs.values()]
        parts = encoded.targets.split(sizes)
        targets = dict(zip(inputs, parts, strict=True))
        self._hold_out_what_lacks(task, inputs, targets, encoded.names)
        self._refuse_unlike(inputs)

        def stored(tensor: Tensor) -> Tensor:
            dtype = stored_type(tensor, self.normalise)
            return tensor.to(dtype, copy=True)

        splits = []
        for name in _SPLITS:
            of_split = each(inputs[name], stored)
            splits.append(Split(of_split, targets[name]))
        return encoded_dataset(self, task, splits, encoded)

    def _refuse_unlike(self, inputs: Mapping[str, Tensor]) -> None:
        wanted = described(inputs["train"])
        for name in _SPLITS:
            found = described(inputs[name])
            if found != wanted:
                raise self._wrong(f"has inputs {found} in '{name}'", f"{wanted}, as in 'train'")

    def _hold_out_what_lacks(
        self,
        task: Task,
        inputs: dict[str, Tensor],
        targets: dict[str, Tensor],
        names: tuple[str, ...],
    ) -> None:
        """Adds the splits that are not there, held out of the training examples."""
        own_test = "test" in inputs
        for name, share in (("test", self.test), ("validation", self.validation)):
            if name in inputs:
                continue
            fraction = share
            if name == "validation" and not own_test:
                fraction = share / (1 - self.test)
            train = Split(inputs["train"], targets["train"])
            everything = torch.arange(len(train.targets))
            left, held = hold_out(
                options=self,
                task=task,
                indices=everything,
                targets=train.targets,
                fraction=fraction,
                names=names,
            )
            inputs[name] = train.inputs[held]
            targets[name] = train.targets[held]
            inputs["train"] = train.inputs[left]
            targets["train"] = train.targets[left]

    def fingerprint(self) -> str | None:
        """Of the module's file, for the processes of one search: what else the function reads
        cannot be told.

        None without a search, or where the function does not come from a file.
        """
        session = os.environ.get(SESSION)
        import_by_path(self.factory, "data factory")
        module, _, _ = self.factory.partition(":")
        file = getattr(sys.modules[module], "__file__", None)
        if not session or not file:
            return None
        path = Path(file)
        if not path.is_file():
            return None
        return f"{session} {files_state([path])}"

    def _as_inputs(self, given: Any) -> Tensor:
        if isinstance(given, tuple):
            given = dict(enumerate(given))
        if not isinstance(given, Mapping):
            return self._one_input(given)
        made = {}
        for key, part in given.items():
            name = str(key)
            made[name] = self._one_input(part, least=1)
        lengths = {len(tensor) for tensor in made.values()}
        if len(lengths) != 1:
            sizes = ", ".join(f"{name} {len(tensor)}" for name, tensor in made.items())
            raise self._wrong(f"has inputs of different lengths ({sizes})", "one of each for each")
        return Several(made)

    def _one_input(self, given: Any, least: int = 2) -> Tensor:
        inputs = self._tensor(given, "inputs")
        fits = inputs.ndim >= least and inputs.numel() > 0
        if not fits or inputs.is_complex():
            shape = tuple(inputs.shape)
            raise self._wrong(
                f"has inputs of shape {shape} and type {inputs.dtype}",
                "real numbers of shape (examples, …)",
            )
        return inputs

    def _tensor(self, given: Tensor | np.ndarray[Any, Any], part: str) -> Tensor:
        if hasattr(given, "to_numpy"):
            given = given.to_numpy()  # a table of pandas
        try:
            with warnings.catch_warnings():
                # Nothing writes to it.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                made = torch.as_tensor(given).detach().cpu()
        except TypeError:
            kind = getattr(given, "dtype", "?")
            raise self._wrong(f"has {part} that are an array of {kind}", "numbers") from None
        if made.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return made.long()  # torch can do little with these
        return made

    def _check_split(self, data: Dataset, name: str) -> None:
        inputs, targets = getattr(data, name)
        shape = shape_of_one(inputs)
        count = len(targets)
        one_each = count > 0 and len(inputs) == count
        if not one_each or shape != data.input_shape:
            whole_shape = (len(inputs), *shape)
            raise self._wrong(
                f"has a split '{name}' of shape {whole_shape} with {count} targets",
                f"examples of the shape {data.input_shape}, with one target each",
            )
        found = described(inputs)
        alike = found == described(data.train.inputs)
        usual = all(_is_usual(tensor) for tensor in tensors(inputs).values())
        if not alike or not usual:
            raise self._wrong(
                f"has inputs of {found} in '{name}'",
                "float32, int64, bool, or uint8 images (N, channels, height, width), in all",
            )

    def _checked(self, data: Dataset, task: Task) -> Dataset:
        """The data set, on the CPU, with what a network needs of it checked."""
        for name in _SPLITS:
            self._check_split(data, name)
        data = data.to(torch.device("cpu"))
        splits = (data.train, data.validation, data.test)
        sizes = [len(split.targets) for split in splits]
        all_targets = torch.cat([split.targets for split in splits])
        encoded = task.encode(all_targets, data.names, data.outputs)
        parts = encoded.targets.split(sizes)
        encoded_splits = []
        for stored, targets in zip(splits, parts, strict=True):
            encoded_splits.append(Split(stored.inputs, targets))
        train, validation, test = encoded_splits
        data = replace(data, train=train, validation=validation, test=test)
        data = replace(data, outputs=encoded.outputs, names=encoded.names)
        data = attach(data, task)
        images = train.inputs
        if data.mean is not None and data.std is not None:
            return data
        if isinstance(images, Several) or not is_image(images):
            return data
        mean, std = channel_statistics(images)
        return replace(data, mean=mean, std=std)

    def _wrong(self, what: str, right: str) -> UserError:
        return UserError(
            f"what the data factory '{self.factory}' returned {what}; right would be {right}"
        )


def _describe(made: object) -> str:
    """The type of what came back; of a tuple, also the types in it."""
    if not isinstance(made, tuple):
        return f"of type {type(made).__name__}"
    types = ", ".join(type(part).__name__ for part in made)
    return f"a tuple of ({types})"


def _is_usual(tensor: Tensor) -> bool:
    """Whether it is of a type that data sets store."""
    if is_image(tensor):
        return True
    return tensor.dtype in (torch.float32, torch.int64, torch.bool)


def _are_examples(made: object) -> bool:
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
    return bool(parts) and all(_is_array(part) for part in parts)


def _is_array(made: object) -> bool:
    """Whether it is a tensor, an array, or a table of pandas."""
    return isinstance(made, Tensor | np.ndarray) or hasattr(made, "to_numpy")


def _joined(targets: list[Any]) -> Any:
    """The targets of several splits, one after the other."""
    if not all(isinstance(of_split, Tensor) for of_split in targets):
        arrays = [np.asarray(of_split) for of_split in targets]
        return np.concatenate(arrays)
    widths = {tuple(of_split.shape[1:]) for of_split in targets}
    if len(widths) > 1:
        shown = " and ".join(map(str, sorted(widths)))
        raise UserError(f"the splits have targets of different shapes, (N, …) of {shown}")
    return torch.cat(targets)
