"""Data sets as tensors: stored as compactly as they come, and split with a fixed seed."""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slimfront.trainables.data.ahead import ahead
from slimfront.trainables.data.finite import refuse_no_numbers
from slimfront.trainables.data.normalise import (
    Constants,
    Normalise,
    chosen,
    constants,
    is_image,
    stored_type,
)
from slimfront.trainables.data.tensor_file import Allocator, in_process, pieces
from slimfront.trainables.data.text import trimmed
from slimfront.trainables.data.transforms import Augment, Draws, augment, varied
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.gpu import free_memory, to_device
from slimfront.trainables.inputs import Call, Several, described, each, shape_of_one
from slimfront.trainables.options import Options, Registry
from slimfront.trainables.tasks import ActiveTask, Classification, Encoded, Task

Division = Literal["auto", "stratified", "random", "groups", "order"]

CLASSIFICATION = Classification()
"""The task where a config names none."""

PREFETCH = 4
"""Batches that are read ahead of training."""


class Split(NamedTuple):
    """Examples of one split, as stored: `inputs` (N, *input_shape), `targets` (N, …) as the task
    has them."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Dataset:
    """The three splits of a data set.

    The search trains on `train` and judges by `validation`; `test` is touched once per front
    member, at the end.

    Images are stored as uint8 (N, C, H, W), a quarter of their size as float32; `mean` and `std`
    (C, 1, 1) of the training split normalise them. Whole numbers, such as token ids, are stored and
    stay as they are. Other inputs are stored as float32, as networks see them, without `mean` and
    `std`; `standardised_by` has the mean and standard deviation that made them so. Networks get
    what `prepare` or `augmented` makes of stored inputs, on `device`.
    """

    train: Split
    validation: Split
    test: Split
    outputs: int | None = None
    """How many outputs the head of a network has; None: what the task says."""
    mean: Tensor | None = None
    std: Tensor | None = None
    standardised_by: tuple[Tensor, Tensor] | None = None
    augment: Augment = field(default_factory=Augment)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    streamed: bool = False
    """Whether its examples are on disk, and may not all fit into memory."""
    names: tuple[str, ...] = ()
    """What each output stands for, where the targets that came were something else."""
    normalised: str = "none"
    """How the inputs were normalised, in the words of `data.normalise`."""
    attached: ActiveTask | None = None
    """The task, once the data set is loaded."""

    def __post_init__(self) -> None:
        several = isinstance(self.train.inputs, Several)
        if self.augment.active and (several or len(self.input_shape) != 3):
            raise UserError(
                "data.augment needs images of the shape (channels, height, width), and this data "
                "set's inputs have the shape "
                f"{self.input_shape}; leave 'augment' out"
            )

    @property
    def task(self) -> ActiveTask:
        """What networks are trained for on these data."""
        assert self.attached is not None, "it was not loaded by load_once"
        return self.attached

    @property
    def call(self) -> Call:
        """How a network is called with these inputs."""
        inputs = self.train.inputs
        names = None
        if isinstance(inputs, Several):
            names = tuple(inputs.named)
        return Call(names, self.task.options.output)

    @property
    def head(self) -> int:
        """How many outputs a network has for the task."""
        return self.task.outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch; of the first where there are several."""
        return shape_of_one(self.train.inputs)

    def prepare(self, inputs: Tensor) -> Tensor:
        """What a network sees of stored `inputs` (N, *input_shape): on `device`, normalised."""
        inputs = each(inputs, lambda tensor: to_device(tensor, self.device))
        if self.mean is None or self.std is None:
            return inputs
        if isinstance(inputs, Several):
            return inputs
        return (inputs.float() - self.mean) / self.std

    def raw(self, inputs: Tensor) -> Tensor:
        """Stored `inputs` (N, *input_shape) as they were before any normalisation: what a shipped
        network takes."""
        if self.standardised_by is None or isinstance(inputs, Several):
            return inputs
        mean, std = self.standardised_by
        device = inputs.device
        return inputs * std.to(device) + mean.to(device)

    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation, on the CPU, that turn raw inputs x into what a network sees:
        (x − mean) / std; None where it sees them as they are."""
        if self.mean is not None and self.std is not None:
            return self.mean.cpu(), self.std.cpu()
        return self.standardised_by

    def augmented(self, inputs: Tensor, *generators: torch.Generator) -> Tensor:
        """`prepare` with the data set's augmentation, for training; without one, nothing is drawn.

        Each generator varies an equal part of `inputs`, as it would by itself.
        """
        if not self.augment.active or isinstance(inputs, Several):
            return self.prepare(inputs)
        there = to_device(inputs, self.device)
        augmented = augment(there, self.augment, *generators)
        return self.prepare(augmented)

    def varied(self, inputs: Tensor, draws: Draws) -> Tensor:
        """`prepare` of `inputs`, which are on `device`, with the augmentation that was drawn for
        them."""
        if not isinstance(inputs, Several):
            inputs = varied(inputs, self.augment, draws)
        return self.prepare(inputs)

    def batches(self, chosen: Iterable[Tensor]) -> Generator[Split]:
        """The training examples at each of these indices (n,), as they are stored.

        Those of a streamed data set are read ahead by a thread, at most `PREFETCH` batches; it ends
        when the iterator is exhausted or closed (`contextlib.closing`). Nothing random happens
        there, so the same batches come either way.
        """
        stored, all_targets = self.train

        def taken(indices: Tensor) -> Split:
            inputs = each(stored, lambda tensor: tensor.index_select(0, indices))
            targets = all_targets.index_select(0, indices)
            return Split(*trimmed(inputs, targets))

        if self.streamed and all_targets.device.type == "cpu":
            yield from ahead(taken, chosen, PREFETCH)
        else:
            yield from map(taken, chosen)

    def to(self, device: torch.device) -> "Dataset":
        """The data set for networks on `device`: stored there if it takes at most half of the
        memory that is free.

        Otherwise it stays where it is, and its batches move one by one.
        """
        moved = replace(self, device=device)
        if self.mean is not None:
            mean = self.mean.to(device)
            moved = replace(moved, mean=mean)
        if self.std is not None:
            std = self.std.to(device)
            moved = replace(moved, std=std)
        if self.attached is not None:
            attached = self.attached.to(device)
            moved = replace(moved, attached=attached)
        splits = [self.train, self.validation, self.test]
        stored_bytes = sum(map(nbytes, splits))
        needed = 2 * stored_bytes
        if device.type == "cuda" and needed > free_memory(device):
            return moved
        there = []
        for stored in splits:
            inputs = each(stored.inputs, lambda tensor: tensor.to(device))
            targets = stored.targets.to(device)
            there.append(Split(inputs, targets))
        train, validation, test = there
        return replace(moved, train=train, validation=validation, test=test)


class Data(Options):
    """Options of a data set, and its loader. Options are hashable, so that a process loads each set
    once.

    `validation` and `test` are the fractions of all examples held out; `seed` fixes the split.
    `division` says how examples are divided: `stratified` (equal shares of each kind of target in
    all splits), at `random`, by `groups` (those of one group in one split, where the data has
    groups), or by `order` (the last ones are the test set, as for time series); `auto` is by groups
    where the data has some, stratified where the task has kinds of targets, else at random.
    `normalise` says what networks see: `per_feature`, `per_channel` or `global` (less the mean,
    divided by the standard deviation of the training split), `none`, or `{mean: …, std: …}` of your
    own; `auto` is per feature for tables, per channel for uint8 images, none for whole numbers, and
    global for all else. `augment` varies the training images. `in_memory` says where the examples
    are: `true`, in the memory of each process; `false`, on disk, from which batches are read ahead;
    `auto`, in the node's cache, which its processes share, and read ahead from there if they take
    more than half of the memory.
    """

    name: str
    validation: float = Field(0.2, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    division: Division = "auto"
    normalise: Normalise = "auto"
    augment: Augment = Augment()
    in_memory: bool | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.validation + (self.test or 0) >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) leave no training examples"
            )
        return self

    def load(self, task: Task = CLASSIFICATION, allocate: Allocator = in_process) -> Dataset:
        """Reads and splits the data, on the CPU, without augmentation.

        Args:
            task: makes targets of what the data has.
            allocate: allocates large tensors; a loader that uses it only in small steps
                handles more than memory holds.

        Raises:
            UserError: if it is not there, or is not what the options say.
        """
        raise NotImplementedError(f"the data set '{self.name}' does not say how it is loaded")

    def fingerprint(self) -> str | None:
        """Changes whenever `load` would give something else for the same options, such as when a
        file that it reads changes.

        None: it cannot be told, or loading is faster than looking it up; then the data set is not
        kept in the node's cache.
        """
        return None


DATA: Registry[Data] = Registry("data set")


def split(
    options: Data,
    task: Task,
    inputs: Tensor,
    given: Any,
    allocate: Allocator = in_process,
    *,
    names: Sequence[str] = (),
    groups: Tensor | None = None,
) -> Dataset:
    """Divides examples into training, validation and test, as `options.division` says.

    Args:
        inputs: (N, *input_shape) real numbers, or several such tensors by name. Images (N, C, H, W)
            of uint8 stay uint8, and whole numbers stay whole; all else becomes float32. See
            `normalised`.
        given: (N, …) targets as they came: see `Task.encode`.
        allocate: allocates the inputs of each split.
        names: what each target stands for, where the data says so.
        groups: (N,) whole numbers; examples of one group are in one split.

    Raises:
        UserError: if there are too few examples, an input is NaN or infinite, or the task does not
            take the targets.
    """
    refuse_no_numbers(inputs)
    encoded = task.encode(given, names)
    splits = []
    for places in split_indices(
        options=options, task=task, targets=encoded.targets, groups=groups, names=encoded.names
    ):
        taken = each(inputs, partial(_taken, places, options.normalise, allocate))
        splits.append(Split(taken, encoded.targets[places]))
    return encoded_dataset(options, task, splits, encoded)


def encoded_dataset(
    options: Data, task: Task, splits: Sequence[Split], encoded: Encoded
) -> Dataset:
    """The data set of a training, a validation and a test split, normalised, with the task at
    work on it; `encoded` are the targets of all."""
    train, validation, test = splits
    made = normalised(options, train, validation, test)
    made = replace(made, outputs=encoded.outputs, names=encoded.names)
    return attach(made, task)


def _taken(places: Tensor, asked: Normalise, allocate: Allocator, tensor: Tensor) -> Tensor:
    """The rows of a tensor at these places (n,), in the type that they are stored in."""
    shape = (len(places), *tensor.shape[1:])
    dtype = stored_type(tensor, asked)
    taken = allocate(shape, dtype)
    parts = pieces(taken)
    rows = len(parts[0])
    for part, own in zip(parts, places.split(rows), strict=True):
        part.copy_(tensor[own])
    return taken


def nbytes(split: Split) -> int:
    """How many bytes the tensors of a split have."""
    return split.targets.nbytes + split.inputs.nbytes


def split_indices(
    options: Data,
    task: Task,
    targets: Tensor,
    groups: Tensor | None = None,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The indices (n,) of the training, validation and test examples of all `targets` (N, …);
    `names` are what the outputs stand for, for messages.

    Raises:
        UserError: if there are too few examples.
    """
    held_out = options.validation + options.test
    everything = torch.arange(len(targets))
    if options.division == "groups" and groups is None:
        raise UserError(
            "data.division is groups, and the data has none; its factory returns (inputs, targets, "
            "groups)"
        )
    if groups is not None and options.division in ("auto", "groups"):
        train, rest = _hold_out_groups(options, everything, groups, held_out)
        validation, test = _hold_out_groups(options, rest, groups, options.test / held_out)
        return train, validation, test
    train, rest = hold_out(
        options=options,
        task=task,
        indices=everything,
        targets=targets,
        fraction=held_out,
        names=names,
    )
    validation, test = hold_out(
        options=options,
        task=task,
        indices=rest,
        targets=targets,
        fraction=options.test / held_out,
        names=names,
    )
    return train, validation, test


def hold_out(
    options: Data,
    task: Task,
    indices: Tensor,
    targets: Tensor,
    fraction: float,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Divides `indices` (n,) of `targets` (N, …) into what is left and the held-out `fraction`.

    Raises:
        UserError: if there are too few examples.
    """
    from sklearn.model_selection import train_test_split

    if options.division == "groups":
        raise UserError(
            "data.division is groups, and the data has splits of its own and no groups; leave it "
            "out, or give all three splits"
        )
    # Rounded, so that 0.2 + 0.4 of 60 rows are 36 of them, not 37.
    count = math.ceil(round(fraction * len(indices), 6))
    if options.division == "order":
        _refuse_nothing_left(options, len(indices), count)
        return indices[:-count], indices[-count:]
    strata = _strata(options, task, targets)
    stratify = None
    if strata is not None:
        stratify = strata[indices].numpy()
    try:
        left, held = train_test_split(
            indices.numpy(), test_size=count, random_state=options.seed, stratify=stratify
        )
    except ValueError as error:
        share = "examples"
        reason = first_line(error)
        if strata is not None:
            share = "every kind of target"
            rarest = _rarest(task, strata[indices], names)
            too_rare = "least populated" in reason
            reason = f"{rarest}; two are needed" if too_rare else f"{rarest}; {reason}"
        raise UserError(
            f"the data set '{options.name}' has too few examples to hold out a share of "
            f"{fraction:.3g} of {share}: {reason}"
        ) from None
    return torch.from_numpy(left), torch.from_numpy(held)


def _strata(options: Data, task: Task, targets: Tensor) -> Tensor | None:
    if options.division not in ("auto", "stratified"):
        return None
    strata = task.strata(targets)
    if strata is None and options.division == "stratified":
        raise UserError(
            f"data.division is stratified, and the task {task.name} has no kinds of targets whose "
            "shares could be equal; set it to random"
        )
    return strata


def _rarest(task: Task, strata: Tensor, names: Sequence[str]) -> str:
    """Names the stratum that is too rare."""
    values, counts = strata.unique(return_counts=True)
    rarest = int(counts.argmin())
    number = int(counts[rarest])
    which = task.stratum(int(values[rarest]), names)
    plural = ""
    if number > 1:
        plural = "s"
    return f"{which} has {number} example{plural}"


def _refuse_nothing_left(options: Data, available: int, held: int) -> None:
    if held >= available:
        raise UserError(
            f"the data set '{options.name}' has too few examples: none of {available} is left when "
            f"{held} are held out"
        )


def _hold_out_groups(
    options: Data, indices: Tensor, groups: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """As `hold_out`, with the examples of a group on one side."""
    from sklearn.model_selection import GroupShuffleSplit

    drawn = GroupShuffleSplit(1, test_size=fraction, random_state=options.seed)
    own_groups = groups[indices].numpy()
    try:
        left, held = next(drawn.split(indices.numpy(), groups=own_groups))
    except ValueError as error:
        raise UserError(
            f"the data set '{options.name}' has too few groups to hold out a share of "
            f"{fraction:.3g} of them: {error}"
        ) from None
    return indices[torch.from_numpy(left)], indices[torch.from_numpy(held)]


def normalised(options: Data, train: Split, validation: Split, test: Split) -> Dataset:
    """The data set of three splits, normalised by the training split as `options.normalise` says.

    uint8 images stay as they are, beside the mean and standard deviation of each channel. float32
    inputs are standardised here, in place.

    Raises:
        UserError: if the inputs have no features or channels of the kind, or another number.
    """
    inputs = train.inputs
    if isinstance(inputs, Several):
        return _of_several(options, train, validation, test)
    how = chosen(options.normalise, inputs)
    words = "by given constants"
    if not isinstance(how, Constants):
        words = how.replace("_", " ")
    made = Dataset(train, validation, test, normalised=words)
    if how == "none" and not is_image(inputs):
        return made
    mean, std = constants(how, inputs)
    if is_image(inputs):
        return replace(made, mean=mean, std=std)
    for split in (train, validation, test):
        for part in pieces(split.inputs):
            part.sub_(mean)
            part.div_(std)
    return replace(made, standardised_by=(mean, std))


def _of_several(options: Data, train: Split, validation: Split, test: Split) -> Dataset:
    """Several inputs, which are not normalised."""
    if options.normalise not in ("auto", "none"):
        raise UserError(
            f"data.normalise is {options.normalise}, and the data has several inputs "
            f"({described(train.inputs)}), which are taken as they are; normalise them yourself, "
            "and leave it out"
        )
    return Dataset(train, validation, test)


def attach(data: Dataset, task: Task) -> Dataset:
    """The data set with the task at work on it."""
    targets = data.train.targets.cpu()
    outputs = data.outputs
    if outputs is None:
        outputs = task.encode(targets).outputs
    active = task.attach(targets, Encoded(targets, outputs, data.names))
    return replace(data, outputs=outputs, attached=active)
