"""The Ray class trainable: the same results in a reused process, a fresh one, and after a
checkpoint."""

import builtins
import copy
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from slimfront import Candidate, train
from slimfront.trainables.distributed.team import LostProcess
from slimfront.trainables.trainable import CandidateTrainable
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CANDIDATE

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(120)]

VOLATILE = {
    "time_this_iter_s",
    "time_total_s",
    "time_since_restore",
    "date",
    "timestamp",
    "pid",
    "hostname",
    "node_ip",
}
VOLATILE |= {"trial_id", "iterations_since_restore", "training_iteration", "config"}


def config_of(**changes: Any) -> dict[str, Any]:
    tree = copy.deepcopy(SMALL_CANDIDATE) | changes
    tree["training"] = tree["training"] | {"report_every": 2}
    return {
        "candidate": Candidate.model_validate(tree).model_dump(mode="json"),
        "resources": {"CPU": 1},
    }


FIRST = config_of(
    model={"name": "mlp", "depth": 2, "width": 24},
    sparsifier={"name": "magnitude", "sparsity": 0.9},
)
SECOND = config_of()
DIVERGING = config_of(training=SMALL_CANDIDATE["training"] | {"lr": 1e30})


@ray.remote(num_cpus=1)
class Process:
    """A trainable in a process of its own, as Tune runs it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.trainable = CandidateTrainable(config)

    def run(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        while not results or not results[-1]["done"]:
            results.append(self.trainable.train())
        return [
            {key: value for key, value in result.items() if key not in VOLATILE}
            for result in results
        ]

    def reset(self, config: dict[str, Any]) -> bool:
        return bool(self.trainable.reset(config))

    def pids(self) -> list[int]:
        """Of this process, and of those that train with it."""
        return [os.getpid(), *(child.pid for child in self.trainable.team.children.values())]


def all_in_turn(*configs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The results of several trials that one process runs after another."""
    process = Process.remote(configs[0])
    try:
        results = [ray.get(process.run.remote())]
        for config in configs[1:]:
            assert ray.get(process.reset.remote(config))
            results.append(ray.get(process.run.remote()))
    finally:
        ray.kill(process)
    return results


def run_in_turn(*configs: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the last of several trials that one process runs after another."""
    return all_in_turn(*configs)[-1]


@pytest.fixture(scope="module")
def fresh(ray_session: None) -> list[dict[str, Any]]:
    """The results of SECOND in a fresh process."""
    return run_in_turn(SECOND)


@pytest.mark.parametrize(
    "earlier",
    [pytest.param([FIRST], marks=pytest.mark.slow), [DIVERGING, SECOND]],
    ids=["another", "diverged and the same"],
)
def test_a_reused_process_and_a_fresh_one_give_bit_identical_results(
    fresh: list[dict[str, Any]], earlier: list[dict[str, Any]]
) -> None:
    assert run_in_turn(*earlier, SECOND) == fresh


def test_the_trainable_reports_what_training_alone_gives(fresh: list[dict[str, Any]]) -> None:
    results = fresh
    alone = train(Candidate.model_validate(SECOND["candidate"]))
    assert [epoch for result in results for epoch in result["history"]] == alone.history
    assert {name: results[-1][name] for name in alone.measures} == alone.measures
    assert [len(result["history"]) for result in results] == [2, 1]


def raising(error: str) -> dict[str, Any]:
    model = {"factory": "tests.trainables.test_trainable:Raises", "args": {"error": error}}
    return config_of(model=model, penalties={}, sparsifier=None, compaction={"enabled": False})


ERRORS = ("IndexError", "ValueError", "RuntimeError", "AttributeError", "AssertionError")


@pytest.fixture(scope="module")
def failures(ray_session: None, fresh: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last result of a trial that diverges, and of those that raise, by error, all of one
    process, which lives on."""
    *failed, well = all_in_turn(DIVERGING, *map(raising, ERRORS), SECOND)
    assert well == fresh
    return {name: results[-1] for name, results in zip(("", *ERRORS), failed, strict=True)}


def test_divergence_is_a_result_and_the_process_lives_on(
    failures: dict[str, dict[str, Any]],
) -> None:
    last = failures[""]
    assert last["done"]
    assert "diverged" in last["failure"]
    assert "val_accuracy" not in last


def test_a_checkpoint_is_plain_and_continues_bit_exactly(tmp_path: Path) -> None:
    whole = CandidateTrainable(SECOND)
    results = [whole.train(), whole.train()]
    interrupted = CandidateTrainable(SECOND)
    interrupted.train()
    interrupted.save_checkpoint(str(tmp_path))
    continued = CandidateTrainable(SECOND)
    continued.load_checkpoint(str(tmp_path))
    last = continued.train()
    for name in ("history", "val_accuracy", "nonzero_params", "compaction"):
        assert last[name] == results[-1][name]
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["epoch"] == 2
    assert state["candidate"] == SECOND["candidate"]
    # The compact network of that moment.
    assert torch.load(tmp_path / "network.pt", weights_only=True)["nodes"]
    resumed = CandidateTrainable(SECOND | {"resume_from": str(tmp_path)})
    assert resumed.train()["history"] == results[-1]["history"]


def test_every_report_has_measures_of_the_compact_network_and_measuring_changes_nothing() -> None:
    often, rarely = (CandidateTrainable(SECOND | {"report_at": at}) for at in ([1, 2, 3], []))
    reports = [often.train(), often.train(), often.train()]
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert [report["finished"] for report in reports] == [False, False, True]
    assert all(
        report["nonzero_params"] > 0 and 0 <= report["val_accuracy"] <= 1 for report in reports
    )
    seldom = [rarely.train(), rarely.train()]
    assert [e for r in seldom for e in r["history"]] == [e for r in reports for e in r["history"]]
    assert seldom[-1]["val_accuracy"] == reports[-1]["val_accuracy"]


def test_refit_is_for_the_last_report_only() -> None:
    trainable = CandidateTrainable(config_of(refit={"epochs": 2}))
    first, last = trainable.train(), trainable.train()
    assert [epoch["epoch"] for epoch in first["history"]] == [1, 2]
    assert [epoch["epoch"] for epoch in last["history"]] == [3, 4, 5]
    assert (first["epoch"], last["epoch"]) == (2, 5)


@pytest.mark.slow
def test_two_processes_share_a_trial_and_the_next_and_end_with_the_one_that_ray_started() -> None:
    shared = SECOND | {"resources": {"CPU": 2}, "processes": 2}
    process = Process.options(num_cpus=2).remote(shared)
    first, pids = ray.get([process.run.remote(), process.pids.remote()])
    assert ray.get(process.reset.remote(shared))
    assert ray.get(process.run.remote()) == first  # rounding is the same, too
    assert ray.get(process.pids.remote()) == pids
    alone = train(Candidate.model_validate(SECOND["candidate"]))
    losses = [epoch["train_loss"] for result in first for epoch in result["history"]]
    # CKA-SR sees halves.
    assert losses == pytest.approx([epoch["train_loss"] for epoch in alone.history], rel=0.05)
    others = [psutil.Process(pid) for pid in pids[1:]]
    assert len(others) == 1
    os.kill(pids[0], signal.SIGKILL)
    gone, alive = psutil.wait_procs(others, timeout=60)
    assert gone
    assert not alive


@pytest.mark.parametrize(("gpus", "expected"), [(0.25, [0.25]), (1, []), (0, [])])
def test_a_trial_on_a_share_of_a_gpu_may_take_that_share_of_its_memory(
    gpus: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    devices: list[str] = []

    def training(candidate: Candidate, device: str) -> Training:
        devices.append(device)
        return Training(candidate)

    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr("slimfront.trainables.trainable.training_of", training)
    CandidateTrainable(SECOND | {"resources": {"CPU": 1, "GPU": gpus}}).train()
    assert shares == expected
    assert devices == ["cuda" if gpus else "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_share_of_a_gpu_is_a_limit_that_batches_can_be_halved_at() -> None:
    try:
        CandidateTrainable(SECOND | {"resources": {"CPU": 1, "GPU": 0.01}}).train()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(
                torch.cuda.get_device_properties(0).total_memory // 50,
                dtype=torch.uint8,
                device="cuda",
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.slow
def test_two_processes_of_a_node_share_what_a_factory_returns(tmp_path: Path) -> None:
    data = {
        "name": "factory",
        "factory": "tests.trainables.data.made:counted",
        "args": {"log": str(tmp_path / "log")},
    }
    config = config_of(
        data=data, model={"name": "mlp", "depth": 1, "width": 4}, penalties={}, sparsifier=None
    )
    processes = [Process.remote(config) for _ in range(2)]
    try:
        results = ray.get([process.run.remote() for process in processes])
    finally:
        for process in processes:
            ray.kill(process)
    assert results[0] == results[1]
    assert len((tmp_path / "log").read_text().split()) == 1


class Raises(torch.nn.Module):
    """A network that raises in training mode."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.error: type[Exception] = getattr(builtins, error)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        if self.training:
            raise self.error("of the user's")
        out: torch.Tensor = self.layer(x.flatten(1))
        return out


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_of_a_trial_is_a_result_with_its_reason_and_the_process_lives_on(
    error: str, failures: dict[str, dict[str, Any]]
) -> None:
    last = failures[error]
    assert last["done"]
    assert f"{error}: of the user's" in last["failure"]
    assert "test_trainable.py, line " in last["failure"]


@pytest.mark.parametrize(
    "error",
    [LostProcess("one of 2"), FileNotFoundError("a bucket"), torch.AcceleratorError("CUDA error")],
)
def test_what_happens_to_a_process_stays_an_exception_so_that_another_takes_the_trial(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Training:
        raise error

    monkeypatch.setattr("slimfront.trainables.trainable.training_of", lost)
    with pytest.raises(type(error)):
        CandidateTrainable(SECOND).train()
