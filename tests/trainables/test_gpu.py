"""What a process may take of a GPU's memory, and, where there is a GPU, a whole training there."""

import copy
from typing import Any

import pytest
import torch

from tests.conftest import SMALL_CANDIDATE
from trainables import Candidate, measure, train
from trainables.gpu import free_memory, take_share


@pytest.mark.parametrize(("share", "free"), [(1.0, 1000), (0.125, 500)])
def test_of_the_free_memory_a_process_has_its_share(monkeypatch: pytest.MonkeyPatch, share: float, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: share if index is None else 0.0)
    assert free_memory(torch.device("cuda")) == free


def test_only_shares_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for gpus in (0, 0.25, 1, 2):
        take_share(gpus)
    assert limits == [0.25]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("model", [{"name": "resnet20", "width": 8}, {"name": "vgg", "depth": 11, "width": 8}])
def test_convolutions_with_batch_norms_are_compact_there_and_measured_as_on_a_cpu(model: dict[str, Any]) -> None:
    candidate = Candidate.model_validate({"model": model, "training": SMALL_CANDIDATE["training"] | {"epochs": 1}})
    trained = train(candidate, "cuda")
    assert trained.compacted.report.difference < 1e-5
    network = trained.compacted.network
    inputs = torch.rand(4, 1, 8, 8)
    on_cpu = measure(copy.deepcopy(network).cpu(), inputs)
    assert measure(network, inputs.cuda()) == on_cpu
