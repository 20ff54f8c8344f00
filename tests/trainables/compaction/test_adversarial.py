"""Networks that are drawn to mislead compaction: sixty here, ten thousand by `make adversarial`."""

import os
import sys
import time

import pytest
import torch

from benchmarks.adversarial import examined
from slimfront.trainables.compaction import compact
from slimfront.trainables.structure.tracing.trace import trace
from tests.trainables.compaction.adversarial import Ended, draw, examine


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_networks_that_mislead_compaction_come_out_right_and_no_larger(first: int) -> None:
    ends = [examine(seed) for seed in range(first, first + 10)]
    assert [end for end in ends if end.problem] == []
    assert sum(end.smaller for end in ends) >= 5


def test_a_number_draws_the_same_network_again() -> None:
    (kinds, one, inputs), (again, other, same) = draw(3), draw(3)
    assert kinds == again
    assert torch.equal(inputs, same)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_the_comparison_sees_a_wrong_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimfront.trainables.compaction import units
    from slimfront.trainables.structure.agreement import Probe

    monkeypatch.setattr(units, "activated", lambda _graph, _activations, bias: bias + 1e-3)
    monkeypatch.setattr(Probe, "difference", lambda *_, **__: 0.0)
    monkeypatch.setattr(sys.modules[compact.__module__], "difference_in_batches", lambda *_: 0.0)
    ends = [examine(seed) for seed in range(5)]
    assert sum(end.problem.startswith("wrong") for end in ends) > 1


@pytest.mark.parametrize("seed", [528, 560, 2154])
def test_networks_that_once_misled_it_come_out_right(seed: int) -> None:
    assert examine(seed).problem == ""


def test_the_comparison_sees_that_dropout_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[compact.__module__]
    monkeypatch.setattr(
        module, "traced_in_both_modes", lambda model, sample=None: trace(model.eval(), sample)
    )
    seeds = [seed for seed in range(120) if "dropout" in draw(seed)[0]]
    ends = [examine(seed) for seed in seeds]
    assert sum(end.problem.startswith("undropped") for end in ends) > len(ends) / 2


def hang(seed: int) -> Ended:
    if seed == 1:
        time.sleep(1000)
    if seed == 2:
        os._exit(3)
    return Ended(seed, (), "compacted")


@pytest.mark.slow
def test_a_network_that_does_not_end_is_a_fault_and_the_others_are_looked_at() -> None:
    began = time.monotonic()
    ends = {end.seed: end for end in examined(list(range(6)), seconds=5, examine=hang)}
    assert time.monotonic() - began < 100
    assert {seed: end.problem for seed, end in ends.items() if end.problem} == {
        1: "fault: did not end within 5 s",
        2: "fault: its process died (3)",
    }
    assert sorted(ends) == list(range(6))


def test_no_more_networks_are_looked_at_once_the_time_is_up() -> None:
    assert list(examined([0, 3], until=time.monotonic() - 1, examine=hang)) == []
