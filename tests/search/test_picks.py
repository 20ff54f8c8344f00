from typing import Any

import pytest

from search.picks import member_name, pick
from trainables.errors import UserError


def member(trial: str, epoch: int, accuracy: float, size: int, step: int = 0, *, knee: bool = False) -> dict[str, Any]:
    measures = {"val_accuracy": accuracy, "nonzero_params": size}
    return {"trial": trial, "epoch": epoch, "one_shot": step, "knee": knee, **measures}


FRONT = [
    member("trial-001", 30, 0.98, 900),
    member("trial-002", 20, 0.95, 400, knee=True),
    member("trial-002", 30, 0.9, 200),
    member("trial-002", 30, 0.5, 50, step=3),
]


@pytest.mark.parametrize(
    ("wanted", "least", "expected"),
    [
        ("knee", None, "trial-002@20"),
        ("knee", 0.97, "trial-001@30"),
        ("smallest", None, "trial-002@30/3"),
        ("smallest", 0.9, "trial-002@30"),
        ("most-accurate", None, "trial-001@30"),
        ("trial-001", None, "trial-001@30"),
        ("trial-002", None, "trial-002@30"),
        ("trial-002@20", None, "trial-002@20"),
        ("trial-002@30/3", None, "trial-002@30/3"),
    ],
)
def test_a_network_is_picked_by_what_it_is_or_by_its_trial(wanted: str, least: float | None, expected: str) -> None:
    assert member_name(pick(FRONT, wanted, least)) == expected


def test_what_is_not_there_gets_a_sentence() -> None:
    with pytest.raises(
        UserError, match=r"--pick trial-009: it is not on the front; choose knee, smallest, most-accurate, or one of "
    ):
        pick(FRONT, "trial-009")
    with pytest.raises(UserError, match=r"no network of the front has validation accuracy 0\.99; the best has 0\.9800"):
        pick(FRONT, "knee", 0.99)
    with pytest.raises(UserError, match="the front is empty"):
        pick([], "knee")
