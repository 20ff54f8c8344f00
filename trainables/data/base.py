"""Data sets as tensors: stored as compactly as they come, and split with a fixed seed."""

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slimfront.trainables.data.ahead import ahead
from slimfront.trainables.data.tensor_file import Allocator, in_process, pieces
from slimfront.trainables.data.transforms import Augment, Draws, augment, channel_statistics, varied
from slimfront.trainables.errors import UserError
from slimfront.trainables.gpu import free_memory, to_device
from slimfront.trainables.options import Options, Registry

PREFETCH = 4
"""Batches that are read ahead of training."""


class Split(NamedTuple):
    """Examples of one split, as stored: `inputs` (N, *input_shape) uint8 or float32, `labels` (N,)
    int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """The three splits of a classification data set.

    The search trains on `train` and judges by `validation`; `test` is touched once per front
    member, at the end.

    Images are stored as uint8 (N, C, H, W), a quarter of their size as float32; `mean` and `std`
    (C, 1, 1) of the training split normalise them. Other inputs are stored as float32, as networks
    see them, without `mean` and `std`; `standardised_by` has the mean and standard deviation that
    made them so. Networks get what `prepare` or `augmented` makes of stored inputs, always float32
    on `device`.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor | None = None
    std: Tensor | None = None
    standardised_by: tuple[float, float] = (0.0, 1.0)
    augment: Augment = field(default_factory=Augment)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    streamed: bool = False
    """Whether its examples are on disk, and may not all fit into memory."""

    def __post_init__(self) -> None:
        if self.augment.active and len(self.input_shape) != 3:
            raise UserError(
                "data.augment needs images of the shape (channels, height, width), and this data "
                "set's inputs have the shape "
                f"{self.input_shape}; leave 'augment' out"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return tuple(self.train.inputs.shape[1:])

    def prepare(self, inputs: Tensor) -> Tensor:
        """What a network sees of stored `inputs` (N, *input_shape): float32 on `device`,
        normalised."""
        inputs = to_device(inputs, self.device)
        if self.mean is None or self.std is None:
            return inputs
        return (inputs.float() - self.mean) / self.std

    def raw(self, inputs: Tensor) -> Tensor:
        """Stored `inputs` (N, *input_shape) as they were before any normalisation: what a shipped
        network takes."""
        mean, std = self.standardised_by
        return inputs if self.mean is not None else inputs * std + mean

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, on the CPU, that turn raw inputs x into what a network sees:
        (x − mean) / std."""
        if self.mean is not None and self.std is not None:
            return self.mean.cpu(), self.std.cpu()
        mean, std = self.standardised_by
        return torch.tensor(mean), torch.tensor(std)

    def augmented(self, inputs: Tensor, *generators: torch.Generator) -> Tensor:
        """`prepare` with the data set's augmentation, for training; without one, nothing is drawn.

        Each generator varies an equal part of `inputs`, as it would by itself.
        """
        if not self.augment.active:
            return self.prepare(inputs)
        return self.prepare(augment(to_device(inputs, self.device), self.augment, *generators))

    def varied(self, inputs: Tensor, draws: Draws) -> Tensor:
        """`prepare` of `inputs`, which are on `device`, with the augmentation that was drawn for
        them."""
        return self.prepare(varied(inputs, self.augment, draws))

    def batches(self, chosen: Iterable[Tensor]) -> Generator[Split]:
        """The training examples at each of these indices (n,), as they are stored.

        Those of a streamed data set are read ahead by a thread, at most `PREFETCH` batches; it ends
        when the iterator is exhausted or closed (`contextlib.closing`). Nothing random happens
        there, so the same batches come either way.
        """

        def taken(indices: Tensor) -> Split:
            return Split(
                self.train.inputs.index_select(0, indices),
                self.train.labels.index_select(0, indices),
            )

        on_disk = self.streamed and self.train.inputs.device.type == "cpu"
        yield from ahead(taken, chosen, PREFETCH) if on_disk else map(taken, chosen)

    def to(self, device: torch.device) -> "Dataset":
        """The data set for networks on `device`: stored there if it takes at most half of the
        memory that is free.

        Otherwise it stays where it is, and its batches move one by one.
        """
        mean, std = (
            None if constant is None else constant.to(device) for constant in (self.mean, self.std)
        )
        moved = replace(self, mean=mean, std=std, device=device)
        splits = (self.train, self.validation, self.test)
        if device.type == "cuda" and 2 * sum(t.nbytes for s in splits for t in s) > free_memory(
            device
        ):
            return moved
        train, validation, test = (Split(s.inputs.to(device), s.labels.to(device)) for s in splits)
        return replace(moved, train=train, validation=validation, test=test)


class Data(Options):
    """Options of a data set, and its loader. Options are hashable, so that a process loads each set
    once.

    `validation` and `test` are the fractions of all examples held out; `seed` fixes the split.
    `augment` varies the training images. `in_memory` says where the examples are: `true`, in the
    memory of each process; `false`, on disk, from which batches are read ahead; `auto`, in the
    node's cache, which its processes share, and read ahead from there if they take more than half
    of the memory.
    """

    name: str
    validation: float = Field(0.2, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    augment: Augment = Augment()
    in_memory: bool | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.validation + (self.test or 0) >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) leave no training examples"
            )
        return self

    def load(self, allocate: Allocator = in_process) -> Dataset:
        """Reads and splits the data, on the CPU, without augmentation.

        Args:
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
    options: Data, inputs: Tensor, labels: Tensor, classes: int, allocate: Allocator = in_process
) -> Dataset:
    """Splits examples into training, validation and test, with equal class shares in each
    (stratified).

    Args:
        inputs: (N, *input_shape) real numbers, of which images (N, C, H, W) uint8 stay uint8, and
            all else becomes float32; see `normalised`.
        labels: (N,) int64 in [0, classes).
        allocate: allocates the inputs of each split.

    Raises:
        UserError: if there are too few examples of a class.
    """
    dtype = torch.uint8 if inputs.dtype == torch.uint8 and inputs.dim() == 4 else torch.float32
    splits = []
    for chosen in split_indices(options, labels):
        taken = allocate((len(chosen), *inputs.shape[1:]), dtype)
        steps = pieces(taken)
        for part, indices in zip(steps, chosen.split(len(steps[0])), strict=True):
            part.copy_(inputs[indices])
        splits.append(Split(taken, labels[chosen]))
    train, validation, test = splits
    return normalised(train, validation, test, classes)


def split_indices(options: Data, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices (n,) of the training, validation and test examples of all `labels` (N,), with
    equal class shares in each.

    Raises:
        UserError: if there are too few examples of a class.
    """
    held_out = options.validation + options.test
    train, rest = hold_out(options, torch.arange(len(labels)), labels, held_out)
    validation, test = hold_out(options, rest, labels, options.test / held_out)
    return train, validation, test


def hold_out(
    options: Data, indices: Tensor, labels: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """Splits `indices` (n,) into what is left and the held-out `fraction`, with equal shares of
    `labels` (N,) in both.

    Raises:
        UserError: if there are too few examples of a class.
    """
    from sklearn.model_selection import train_test_split

    # Rounded, so that 0.2 + 0.4 of 60 rows are 36 of them, not 37.
    count = math.ceil(round(fraction * len(indices), 6))
    try:
        left, held = train_test_split(
            indices.numpy(),
            test_size=count,
            random_state=options.seed,
            stratify=labels[indices].numpy(),
        )
    except ValueError as error:
        raise UserError(
            f"the data set '{options.name}' has too few examples to hold out a share of "
            f"{fraction:.3g} of every class: {error}"
        ) from None
    return torch.from_numpy(left), torch.from_numpy(held)


def normalised(train: Split, validation: Split, test: Split, classes: int) -> Dataset:
    """The data set of three splits, normalised by the training split.

    uint8 images stay as they are, beside the mean and standard deviation of each channel. float32
    inputs are standardised here, in place, by the mean and standard deviation of all training
    inputs together.
    """
    if train.inputs.dtype == torch.uint8:
        return Dataset(train, validation, test, classes, *channel_statistics(train.inputs))
    mean, std = train.inputs.mean(), train.inputs.std()
    std = torch.where(std > 0, std, 1.0)  # constant inputs become zeros, not NaN
    for one in (train, validation, test):
        for part in pieces(one.inputs):
            part.sub_(mean).div_(std)
    return Dataset(train, validation, test, classes, standardised_by=(float(mean), float(std)))
