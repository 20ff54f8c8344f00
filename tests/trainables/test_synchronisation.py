"""Training steps never wait for a GPU: whoever asks for a number of a tensor waits until all that
was launched is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimfront.trainables.packs import Pack
from slimfront.trainables.training.acceleration.step_graphs import StepGraphs
from slimfront.trainables.training.loop import Training
from tests.trainables.recorded import record
from tests.trainables.test_step_graphs import CASES, candidate

PER_EPOCH = 2
READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__contains__",
    "nonzero",
    "unique",
)
OPERATIONS = (
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
)
MOVING = ("rigl", "magnitude", "lottery", "channels")
"""Sparsifiers that change their masks in some steps, and may wait in these."""


class _Operations(TorchDispatchMode):
    def __init__(self, counts: list[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        boolean = name == "aten::index" and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in OPERATIONS or boolean:
            self.counts.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lists by what the code within would wait for a GPU, if its tensors were there."""
    found: list[str] = []
    with monkeypatch.context() as patches:
        for name in READS:
            real = getattr(torch.Tensor, name)

            def read(
                self: torch.Tensor, *args: Any, _name: str = name, _real: Any = real, **named: Any
            ) -> Any:
                found.append(_name)
                return _real(self, *args, **named)

            patches.setattr(torch.Tensor, name, read)
        with _Operations(found):
            yield found


def made(name: str, how: str) -> Training:
    training = Training(candidate(**CASES[name]))
    if how == "recorded":
        training.graphs = StepGraphs(training, record)
    return training


@pytest.mark.parametrize("how", ["one by one", "recorded"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in MOVING])
def test_no_step_waits_and_an_epoch_waits_at_most_twice(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = made(name, how)
    training.run_epoch()  # the optimiser makes its state in the first step
    # It reads numbers that no GPU holds.
    monkeypatch.setattr(
        "slimfront.trainables.training.acceleration.step_graphs._outside", lambda *_: ()
    )
    with waits(monkeypatch) as found:
        for _ in training.steps():
            pass
        assert found == []
        training.end_epoch(training.numbers().tolist())
    assert 1 <= len(found) <= PER_EPOCH, found


@pytest.mark.parametrize("name", MOVING)
def test_steps_in_which_masks_stay_do_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = made(name, "one by one")
    training.run_epoch()
    steps, waited = training.steps(), []
    for _ in range(training.steps_per_epoch()):
        step = training.step
        with waits(monkeypatch) as found:
            next(steps)
        assert training.sparsifier is not None
        if found:
            waited.append(step)
        assert not found or training.sparsifier.due(step), found
    steps.close()


def test_a_pack_waits_at_most_twice_in_an_epoch_and_not_for_each_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for how in ("stacked", "recorded"):
        members = [made("random", how) for _ in range(3)]
        pack = Pack(members)
        pack.run_epoch()
        with waits(monkeypatch) as found:
            pack.run_epoch()
        assert 1 <= len(found) <= PER_EPOCH, (how, found)


def test_a_number_that_is_asked_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(2)
    with waits(monkeypatch) as found:
        assert float(tensor[0]) == 1
        assert tensor[tensor > 0].numel() == 2
    assert found == ["__float__", "aten::index"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("graphs", ["auto", False])
@pytest.mark.parametrize("name", [name for name in CASES if name not in MOVING])
def test_on_a_gpu_torch_sees_no_step_wait(name: str, graphs: str | bool) -> None:
    case = CASES[name]
    training = Training(
        candidate(**case | {"training": case.get("training", {}) | {"cuda_graphs": graphs}}), "cuda"
    )
    training.run_epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in training.steps():
            pass
        numbers = training.numbers()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.end_epoch(numbers.tolist())
