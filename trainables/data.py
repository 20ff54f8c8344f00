"""Data sets as tensors, by name; each is loaded once per process and split once with a fixed seed."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainables.options import Options, Registry


class Split(NamedTuple):
    """Examples of one split: `inputs` (N, *input_shape) float32, `labels` (N,) int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """The three splits of a classification data set.

    The search trains on `train` and judges by `validation`; `test` is touched once per front member, at the end.
    """

    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return tuple(self.train.inputs.shape[1:])


class Data(Options):
    """Options of a data set, and its loader. Options are hashable, so that a process loads each set once.

    `validation` and `test` are the fractions of all examples held out; `seed` fixes the split.
    """

    name: str
    validation: float = Field(0.2, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation ({self.validation}) and test ({self.test}) leave no training examples")
        return self

    def load(self) -> Dataset:
        """Reads and splits the data, on the CPU."""
        raise NotImplementedError(f"the data set '{self.name}' does not say how it is loaded")


DATA: Registry[Data] = Registry("data set")


@DATA.register("digits")
class Digits(Data):
    """scikit-learn's digits: 1,797 real 8×8 grey images of handwritten digits."""

    name: Literal["digits"] = "digits"

    def load(self) -> Dataset:
        from sklearn.datasets import load_digits

        raw = load_digits()
        inputs = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8)
        return split(self, inputs, torch.tensor(raw.target, dtype=torch.int64), classes=10)


def split(options: Data, inputs: Tensor, labels: Tensor, classes: int) -> Dataset:
    """Splits examples into training, validation and test, with equal class shares in each (stratified).

    Inputs are standardised by the mean and standard deviation of all training inputs together.
    """
    from sklearn.model_selection import train_test_split

    everything = torch.arange(len(labels)).numpy()
    held_out = options.validation + options.test
    train, rest = train_test_split(everything, test_size=held_out, random_state=options.seed, stratify=labels)
    validation, test = train_test_split(rest, test_size=options.test / held_out, random_state=options.seed, stratify=labels[rest])
    mean, std = inputs[train].mean(), inputs[train].std()
    train_split, validation_split, test_split = (Split((inputs[i] - mean) / std, labels[i]) for i in (train, validation, test))
    return Dataset(train_split, validation_split, test_split, classes)


@lru_cache(maxsize=4)
def load_once(options: Data, device: torch.device) -> Dataset:
    """The data set of these options on `device`, loaded at most once per process."""
    data = options.load()
    train, validation, test = (Split(s.inputs.to(device), s.labels.to(device)) for s in (data.train, data.validation, data.test))
    return Dataset(train, validation, test, data.classes)
