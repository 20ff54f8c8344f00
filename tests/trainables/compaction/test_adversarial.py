"""Networks that are drawn to mislead compaction: sixty here, ten thousand by `make adversarial`."""

import pytest
import torch

from tests.trainables.compaction.adversarial import draw, examine


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
    from slimfront.trainables.compaction.agreement import Probe

    monkeypatch.setattr(
        units, "_constants", lambda weight, bias, **_: (~weight.any(1), bias + 1e-3)
    )
    monkeypatch.setattr(Probe, "difference", lambda *_: 0.0)
    ends = [examine(seed) for seed in range(5)]
    assert sum(end.problem.startswith("wrong") for end in ends) > 1
