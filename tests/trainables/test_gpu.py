"""What a process may take of a GPU's memory, and, where there is a GPU, a whole training there."""

import copy
from typing import Any

import pytest
import torch

from slimfront import Candidate, measure, train
from slimfront.trainables.gpu import free_memory, take_share, to_device
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CANDIDATE

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize(("share", "free"), [(1.0, 1000), (0.125, 500)])
def test_of_the_free_memory_a_process_has_its_share(
    monkeypatch: pytest.MonkeyPatch, share: float, free: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda index: share if index is None else 0.0
    )
    assert free_memory(torch.device("cuda")) == free


def test_only_shares_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for gpus in (0, 0.25, 1, 2):
        take_share(gpus)
    assert limits == [0.25]


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize(
    "model", [{"name": "resnet20", "width": 8}, {"name": "vgg", "depth": 11, "width": 8}]
)
def test_convolutions_with_batch_norms_are_compact_there_and_measured_as_on_a_cpu(
    model: dict[str, Any],
) -> None:
    candidate = Candidate.model_validate(
        {"model": model, "training": SMALL_CANDIDATE["training"] | {"epochs": 1}}
    )
    trained = train(candidate, "cuda")
    assert trained.compacted.report.difference < 1e-5
    network = trained.compacted.network
    inputs = torch.rand(4, 1, 8, 8)
    on_cpu = measure(copy.deepcopy(network).cpu(), inputs)
    assert measure(network, inputs.cuda()) == on_cpu


def test_a_copy_within_a_cpu_is_none() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


class Fake(torch.Tensor):
    """A tensor that says how it was copied to a GPU."""

    def pin_memory(self) -> "Fake":  # type: ignore[override]
        self.pinned = True
        return self

    def to(
        self, device: torch.device, non_blocking: bool = False
    ) -> tuple[bool, torch.device, bool]:  # type: ignore[override]
        return getattr(self, "pinned", False), device, non_blocking


def test_a_copy_to_a_gpu_goes_through_pinned_memory_and_is_not_waited_for() -> None:
    gpu = torch.device("cuda")
    assert to_device(torch.ones(3).as_subclass(Fake), gpu) == (True, gpu, True)


@pytest.mark.gpu
@ON_GPU
def test_on_a_gpu_copies_arrive_though_nobody_waits() -> None:
    numbers = torch.randint(1000, (1_000_000,))
    assert torch.equal(to_device(numbers, torch.device("cuda")).cpu(), numbers)


@pytest.mark.gpu
@ON_GPU
def test_on_a_gpu_a_batch_that_does_not_fit_is_taken_in_parts() -> None:
    tree = {
        "model": {"name": "resnet20", "width": 64},
        "training": {"epochs": 1, "batch_size": 1024, "seed": 0, "optimizer": "sgd", "lr": 0.01},
    }
    roomy = Training(Candidate.model_validate(tree), "cuda")
    expected = roomy.run_epoch()
    peak = torch.cuda.max_memory_allocated()
    halving = tree | {"training": tree["training"] | {"out_of_memory": "halve"}}
    tight = Training(Candidate.model_validate(halving), "cuda")
    del roomy
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        metrics = tight.run_epoch()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.parts > 1
    # Batch norms see the parts.
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=0.2)


@pytest.mark.gpu
@ON_GPU
def test_on_a_gpu_the_speed_up_is_measured_there() -> None:
    candidate = Candidate.model_validate(
        {
            "model": {"name": "mlp", "depth": 3, "width": 64},
            "training": {"epochs": 1},
            "measures": ["speedup", "latency_ms"],
            "latency": {"batch_size": 64},
        }
    )
    trained = train(candidate, "cuda")
    assert 0.1 < trained.measures["speedup"] < 10
    assert trained.measures["latency_ms"] > 0
