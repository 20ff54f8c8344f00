"""Fronts side by side: their columns are what the searches judged."""

import csv
import io
from typing import Any

from slimfront.search.config.objectives import OBJECTIVES, Objective
from slimfront.search.tracking.compare import Front, render
from slimfront.search.tracking.figures import pairs
from slimfront.trainables.measures.described import Measure

NAMES = ["val_accuracy", "latency_ms", "nonzero_params"]


def member(trial: int, **more: Any) -> dict[str, Any]:
    return {
        "trial": f"trial-{trial:03}",
        "epoch": 3,
        "one_shot": 0,
        "val_accuracy": 0.9,
        "test_accuracy": 0.89,
        "latency_ms": 0.0125,
        "nonzero_params": 1234,
        "total_params": 5678,
        "layers": 3,
        "flops": 9876,
        "bytes": 54321,
        "in_region": True,
        "params": {"sparsifier": None, "training.lr": 0.01},
        **more,
    }


def front(*members: dict[str, Any]) -> Front:
    described = [OBJECTIVES[name] for name in NAMES]
    dense = member(0, latency_ms=0.05)
    return Front("mine", NAMES, described, described[0], dense, list(members), 0.5)


def rows_of(one: Front) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render([one], "csv").decode())))


def test_what_is_an_objective_has_a_column() -> None:
    one = front(member(1), member(2, in_region=False))
    dense, first, second = rows_of(one)
    assert (dense["latency_ms"], first["latency_ms"]) == ("0.05", "0.0125")
    assert [row["in_region"] for row in (dense, first, second)] == ["True", "True", "False"]
    assert first["sparsifier"] == "null"
    table = render([one], "table", everything=True).decode()
    assert "latency" in table
    assert "0.0125" in table


def test_means_over_seeds_have_columns_where_there_are_some() -> None:
    assert "seeds" not in rows_of(front(member(1)))[0]
    means = {"seeds": 3, "val_accuracy": {"mean": 0.88, "std": 0.02}}
    dense, first, second = rows_of(front(member(1, replicas=means), member(2)))
    assert (first["seeds"], first["val_accuracy_mean"], first["val_accuracy_std"]) == (
        "3",
        "0.88",
        "0.02",
    )
    assert (dense["seeds"], second["val_accuracy_mean"]) == ("", "")
    table = render([front(member(1, replicas=means))], "table").decode()
    assert "0.8800" in table


def test_the_first_picture_has_a_size_where_there_is_one() -> None:
    loss = Objective(Measure("val_loss", quality=True))
    accuracy, size = OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]
    assert pairs([accuracy, loss, size]) == [(size, accuracy), (loss, accuracy)]
    assert pairs([accuracy, loss]) == [(loss, accuracy)]
