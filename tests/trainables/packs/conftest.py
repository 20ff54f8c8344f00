from collections.abc import Iterator

import pytest
import torch

from tests.trainables.packs.made import few_digits


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64, on few examples."""
    monkeypatch.setattr("slimfront.trainables.training.candidate_setup.load_once", few_digits)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
