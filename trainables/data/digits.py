"""scikit-learn's digits."""

from typing import Literal

import torch

from slimfront.trainables.data.base import CLASSIFICATION, DATA, Data, Dataset, split
from slimfront.trainables.data.tensor_file import Allocator, in_process
from slimfront.trainables.tasks import Task


@DATA.register("digits")
class Digits(Data):
    """scikit-learn's digits: 1,797 real 8×8 grey images of handwritten digits."""

    name: Literal["digits"] = "digits"

    def load(self, task: Task = CLASSIFICATION, allocate: Allocator = in_process) -> Dataset:
        from sklearn.datasets import load_digits

        raw = load_digits()
        inputs = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8)
        return split(
            options=self,
            task=task,
            inputs=inputs,
            given=torch.tensor(raw.target, dtype=torch.int64),
            allocate=allocate,
        )

    def fingerprint(self) -> str | None:
        return (
            ""  # they never change; mapping them into memory saves importing scikit-learn, a second
        )
