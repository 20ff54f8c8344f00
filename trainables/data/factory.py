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
from slimfront.trainables.data.given import are_examples, is_usual, joined_targets, kind_of
from slimfront.trainables.data.loaders import is_torch_data, read_all
from slimfront.trainables.data.normalise import is_image, stored_type
from slimfront.trainables.data.tensor_file import Allocator, in_process
from slimfront.trainables.data.transforms import channel_statistics
from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_few
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.inputs import Several, described, each, shape_of_one, tensors
from slimfront.trainables.tasks import Task

_SPLITS = ("train", "validation", "test")

BySplit = dict[str, Tensor]
"""A tensor for each split, by its name."""

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
        compared = (
            self.factory,
            frozenset(self.args),
            self.validation,
            self.test,
            self.seed,
            self.augment,
        )
        return hash(compared)

    def load(self, task: Task = CLASSIFICATION, allocate: Allocator = in_process) -> Dataset:
        made = self._made()
        if isinstance(made, Dataset):
            return self._checked(made, task)
        if isinstance(made, Mapping) and "train" in made:
            read = {name: self._read(one, task) for name, one in made.items()}
            return self._of_splits(read, task)
        made = self._read(made, task)
        if not are_examples(made):
            kind = kind_of(made)
            raise self._wrong(
                f"is {kind}",
                "a slimfront.trainables.data.Dataset, (inputs, targets) as tensors or arrays, or a "
                "mapping of such by 'train', 'validation' and 'test'",
            )
        examples = made[:2]
        inputs, targets = self._pair(examples)
        groups = None
        if len(made) == 3:
            names = made[2]
            groups = self._groups(names, len(inputs))
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
            arguments = copy.deepcopy(self.args)
            return function(**arguments)
        except UserError:
            raise
        except OF_USERS_CODE as error:
            kind = type(error).__name__
            raise UserError(f"data factory '{self.factory}' raised {kind}: {error}") from error

    def _pair(self, given: Any) -> tuple[Tensor, Any]:
        """Inputs as tensors, and as many targets as they came."""
        if not isinstance(given, tuple | list) or len(given) != 2:
            kind = kind_of(given)
            raise self._wrong(f"has a split that is {kind}", "(inputs, targets)")
        given_inputs, targets = given
        inputs = self._as_inputs(given_inputs)
        examples = len(inputs)
        if isinstance(targets, Mapping):
            names = first_few([f"'{name}'" for name in targets])
            raise self._wrong(
                f"has targets by name, {names}",
                "one tensor, with what belongs to one example put together along an axis; the "
                "loss and the metrics can take it apart",
            )
        count: int | str = "no"
        if hasattr(targets, "__len__"):
            count = len(targets)
        if count != examples:
            raise self._wrong(
                f"has {examples} inputs and {count} targets",
                "one target for each input",
            )
        return inputs, targets

    def _groups(self, given: Any, examples: int) -> Tensor:
        """Groups (N,) as whole numbers, whatever they are called."""
        names = given.tolist() if hasattr(given, "tolist") else list(given)
        count = len(names)
        if count != examples:
            raise self._wrong(f"has {examples} inputs and {count} groups", "a group for each")
        known: dict[Any, int] = {}
        numbers = []
        for name in names:
            next_number = len(known)
            number = known.setdefault(name, next_number)
            numbers.append(number)
        return torch.tensor(numbers)

    def _of_splits(self, made: Mapping[str, Any], task: Task) -> Dataset:
        """The user's own splits; what is left out is held out of the training examples."""
        unknown = [name for name in made if name not in _SPLITS]
        if unknown:
            names = ", ".join(map(str, made))
            raise self._wrong(f"has splits {names}", "train, validation and test")
        inputs: BySplit = {}
        given = []
        for name in _SPLITS:
            if name not in made:
                continue
            own_inputs, own_targets = self._pair(made[name])
            inputs[name] = own_inputs
            given.append(own_targets)
        for name, of_split in inputs.items():
            refuse_no_numbers(of_split, f" of {name}")
        all_targets = joined_targets(given)
        encoded = task.encode(all_targets)
        sizes = [len(of_split) for of_split in inputs.values()]
        parts = encoded.targets.split(sizes)
        targets = dict(zip(inputs, parts, strict=True))
        self._hold_out_what_lacks(task, inputs, targets, encoded.names)
        self._refuse_unlike(inputs)
        splits = []
        for name in _SPLITS:
            stored = each(inputs[name], self._stored)
            splits.append(Split(stored, targets[name]))
        return encoded_dataset(self, task, splits, encoded)

    def _stored(self, tensor: Tensor) -> Tensor:
        """A copy in the type that inputs are stored in."""
        dtype = stored_type(tensor, self.normalise)
        return tensor.to(dtype, copy=True)

    def _refuse_unlike(self, inputs: BySplit) -> None:
        wanted = described(inputs["train"])
        for name in _SPLITS:
            found = described(inputs[name])
            if found == wanted:
                continue
            raise self._wrong(f"has inputs {found} in '{name}'", f"{wanted}, as in 'train'")

    def _hold_out_what_lacks(
        self,
        task: Task,
        inputs: BySplit,
        targets: BySplit,
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
        name, _, _ = self.factory.partition(":")
        module = sys.modules[name]
        file = getattr(module, "__file__", None)
        if not session or not file:
            return None
        path = Path(file)
        if not path.is_file():
            return None
        state = files_state([path])
        return f"{session} {state}"

    def _as_inputs(self, given: Any) -> Tensor:
        if isinstance(given, tuple):
            given = dict(enumerate(given))
        if not isinstance(given, Mapping):
            return self._one_input(given)
        made = {}
        for key, part in given.items():
            name = str(key)
            made[name] = self._one_input(part, least=1)
        lengths = {name: len(tensor) for name, tensor in made.items()}
        different = set(lengths.values())
        if len(different) != 1:
            told = [f"{name} {length}" for name, length in lengths.items()]
            sizes = ", ".join(told)
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
        examples = len(inputs)
        count = len(targets)
        one_each = count > 0 and examples == count
        if not one_each or shape != data.input_shape:
            whole_shape = (examples, *shape)
            raise self._wrong(
                f"has a split '{name}' of shape {whole_shape} with {count} targets",
                f"examples of the shape {data.input_shape}, with one target each",
            )
        found = described(inputs)
        wanted = described(data.train.inputs)
        parts = tensors(inputs).values()
        usual = all(map(is_usual, parts))
        if found != wanted or not usual:
            raise self._wrong(
                f"has inputs of {found} in '{name}'",
                "float32, int64, bool, or uint8 images (N, channels, height, width), in all",
            )

    def _checked(self, data: Dataset, task: Task) -> Dataset:
        """The data set, on the CPU, with what a network needs of it checked."""
        for name in _SPLITS:
            self._check_split(data, name)
        on_cpu = data.to(torch.device("cpu"))
        data = _encoded(on_cpu, task)
        data = attach(data, task)
        if data.mean is not None and data.std is not None:
            return data
        images = data.train.inputs
        if isinstance(images, Several) or not is_image(images):
            return data
        mean, std = channel_statistics(images)
        return replace(data, mean=mean, std=std)

    def _wrong(self, what: str, right: str) -> UserError:
        return UserError(
            f"what the data factory '{self.factory}' returned {what}; right would be {right}"
        )


def _encoded(data: Dataset, task: Task) -> Dataset:
    """The data set with its targets as the task takes them, those of all splits encoded at once."""
    splits = (data.train, data.validation, data.test)
    given = [split.targets for split in splits]
    sizes = [len(targets) for targets in given]
    all_targets = torch.cat(given)
    encoded = task.encode(all_targets, data.names, data.outputs)
    train, validation, test = encoded.targets.split(sizes)
    return replace(
        data,
        train=Split(data.train.inputs, train),
        validation=Split(data.validation.inputs, validation),
        test=Split(data.test.inputs, test),
        outputs=encoded.outputs,
        names=encoded.names,
    )
