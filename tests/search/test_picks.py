import json
from typing import Any

import pytest

from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective
from slimfront.search.record.events import NetworkMeasured, TrialBegan
from slimfront.search.record.front.picks import member_name, pick
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json, as_text, summary
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.described import Measure


def member(
    trial: str, epoch: int, accuracy: float, size: int, step: int = 0, *, knee: bool = False
) -> dict[str, Any]:
    measures = {"val_accuracy": accuracy, "nonzero_params": size}
    return {"trial": trial, "epoch": epoch, "one_shot": step, "knee": knee, **measures}


FRONT: dict[str, Any] = {
    "objectives": ["val_accuracy", "nonzero_params"],
    "front": [
        member("trial-001", 30, 0.98, 900),
        member("trial-002", 20, 0.95, 400, knee=True),
        member("trial-002", 30, 0.9, 200),
        member("trial-002", 30, 0.5, 50, step=3),
    ],
}


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
def test_a_network_is_picked_by_what_it_is_or_by_its_trial(
    wanted: str, least: float | None, expected: str
) -> None:
    assert member_name(pick(FRONT, wanted, least)) == expected


def test_what_is_not_there_gets_a_sentence() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"--pick trial-009: it is not on the front; choose recommended, knee, smallest, "
            r"best, or one of "
        ),
    ):
        pick(FRONT, "trial-009")
    with pytest.raises(
        UserError,
        match=r"has validation accuracy 0\.99 or larger; the best has 0\.98",
    ):
        pick(FRONT, "knee", 0.99)
    with pytest.raises(UserError, match="the front is empty"):
        pick({"objectives": [], "front": []}, "knee")


def test_a_knee_that_is_not_accurate_enough_is_the_knee_of_those_that_are_as_in_the_ledger() -> (
    None
):
    sizes = {0.99: 10_000, 0.98: 2_000, 0.97: 1_800, 0.96: 1_600, 0.7: 30, 0.1: 10}
    ledger = Ledger(
        [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]], {"nonzero_params": 123_456.0}
    )
    for number, (accuracy, size) in enumerate(sizes.items()):
        ledger.apply(TrialBegan(number=number, values={}, seed=0))
        measures = {"val_accuracy": accuracy, "nonzero_params": size, "params": size}
        ledger.apply(
            NetworkMeasured(
                number=number, epoch=1, measures=measures, compaction=[], checkpoint="c"
            )
        )
    report = as_json(SearchResult("s", ledger, ledger.front.members(), 0.0, "", interrupted=False))
    assert pick(report, "knee")["nonzero_params"] == 30
    able = Ledger(
        ledger.objectives, ledger.dense_sizes, [Constraint.parse("val_accuracy", ">= 0.9")]
    )
    for number, trial in enumerate(ledger.trials):
        able.apply(TrialBegan(number=number, values={}, seed=0))
        able.apply(
            NetworkMeasured(
                number=number, epoch=1, measures=trial.measures, compaction=[], checkpoint="c"
            )
        )
    expected = able.front.knee()
    assert expected is not None
    assert (
        pick(report, "knee", 0.9)["nonzero_params"] == expected.measures["nonzero_params"] == 2_000
    )


def test_a_knee_can_be_over_the_number_of_parameters_latency_and_speed_up() -> None:
    rows = [
        (0.99, 4000, 8.0, 1.0),
        (0.95, 900, 2.0, 4.0),
        (0.94, 800, 1.9, 4.1),
        (0.2, 10, 0.1, 80.0),
    ]
    members = [
        member(f"trial-{n:03d}", 1, accuracy, size, knee=accuracy < 0.5)
        | {"params": {"lr": 0.1}, "total_params": size, "latency_ms": latency, "speedup": speedup}
        for n, (accuracy, size, latency, speedup) in enumerate(rows)
    ]
    report = {"objectives": ["val_accuracy", "params", "latency_ms", "speedup"], "front": members}
    assert pick(report, "knee", 0.93)["trial"] == "trial-001"


MSE = Objective(
    Measure("val_mse", "smaller", "validation mse", "relative", short="val mse", quality=True)
)
ERRORS: dict[str, Any] = {
    "objectives": ["val_mse", "nonzero_params"],
    "quality": "val_mse",
    "described": {one.name: one.as_plain() for one in (MSE, OBJECTIVES["nonzero_params"])},
    "front": [
        {
            "trial": f"trial-00{n}",
            "epoch": 9,
            "knee": n == 2,
            "val_mse": mse,
            "nonzero_params": size,
        }
        for n, mse, size in ((1, 2.0, 900), (2, 3.0, 300), (3, 8.0, 200), (4, 90.0, 10))
    ],
}


@pytest.mark.parametrize(
    ("wanted", "worst", "expected"),
    [
        ("best", None, "trial-001@9"),
        ("smallest", None, "trial-004@9"),
        ("smallest", 10, "trial-003@9"),
        ("knee", None, "trial-002@9"),
        ("knee", 2.5, "trial-001@9"),
    ],
)
def test_a_network_is_picked_by_a_metric_that_is_better_when_smaller(
    wanted: str, worst: float | None, expected: str
) -> None:
    assert member_name(pick(ERRORS, wanted, worst)) == expected


def test_a_bound_that_no_error_keeps_is_refused_with_the_smallest() -> None:
    with pytest.raises(UserError, match=r"has validation mse 1 or smaller; the best has 2"):
        pick(ERRORS, "knee", 1)


def test_a_report_of_errors_is_read_back_as_it_was_written() -> None:
    book = Ledger([MSE, OBJECTIVES["nonzero_params"]], {"nonzero_params": 1000.0, "val_mse": 50.0})
    book.apply(TrialBegan(number=0, values={}, seed=0))
    for epoch, mse, size in ((1, 70.5, 100), (2, 0.25, 300)):
        measures = {"val_mse": mse, "nonzero_params": size, "params": 400, "layers": 2, "flops": 9}
        book.apply(
            NetworkMeasured(
                number=0, epoch=epoch, measures=measures, compaction=[], checkpoint=None
            )
        )
    result = SearchResult("s", book, book.front.members(), 1.0, "sqlite:///x.db", False)
    plain = json.loads(json.dumps(as_json(result)))
    assert plain["quality"] == "val_mse"
    assert [one["val_mse"] for one in plain["front"]] == [0.25, 70.5]
    assert pick(plain, "best")["val_mse"] == 0.25
    text = as_text(result, "slimfront")
    assert "val mse" in text and "0.2500" in text and "70.5000" in text


def test_networks_without_a_quality_come_last_and_keep_no_bound() -> None:
    """A metric of the user's may have no value for some network, which is on the front by other
    objectives."""
    front = [dict(member) for member in ERRORS["front"]]
    front[0]["val_mse"] = None
    front[3]["val_mse"] = None
    report = ERRORS | {"front": front}
    assert member_name(pick(report, "best")) == "trial-002@9"
    assert member_name(pick(report, "smallest")) == "trial-004@9"
    assert member_name(pick(report, "smallest", 100)) == "trial-003@9"
    for member in front:
        member["val_mse"] = None
    with pytest.raises(UserError, match="mse 100 or smaller; the best has no number"):
        pick(report, "best", 100)


def book_of(
    qualities: dict[float, int],
    baseline: float | None,
    quality: Objective = OBJECTIVES["val_accuracy"],
    tolerance: float = 0.01,
) -> Ledger:
    """A ledger of networks by quality and size, whose baseline has 1,000 weights."""
    ledger = Ledger(
        [quality, OBJECTIVES["nonzero_params"]],
        {"nonzero_params": 1000.0, quality.name: baseline or 1.0},
        quality=quality,
        tolerance=tolerance,
    )
    networks: list[tuple[int | None, float, int]] = [
        (number, value, size) for number, (value, size) in enumerate(qualities.items())
    ]
    if baseline is not None:
        networks.append((None, baseline, 1000))
    for number, value, size in networks:
        ledger.apply(TrialBegan(number=number, values={}, seed=0))
        measures = {quality.name: value, "nonzero_params": size, "params": size}
        ledger.apply(
            NetworkMeasured(
                number=number, epoch=1, measures=measures, compaction=[], checkpoint="c"
            )
        )
    return ledger


@pytest.mark.parametrize(
    ("qualities", "baseline", "tolerance", "size"),
    [
        ({0.99: 900, 0.975: 300, 0.969: 100, 0.4: 10}, 0.98, 0.01, 300),
        ({0.99: 900, 0.975: 300, 0.969: 100, 0.4: 10}, 0.98, 0.02, 100),
        ({0.99: 900, 0.975: 300, 0.969: 100, 0.4: 10}, 0.98, 0.0, 900),
        ({0.9: 900, 0.8: 300}, 0.98, 0.01, 900),  # none is near: the best
        ({0.9: 900, 0.8: 300}, None, 0.01, 900),
    ],
)
def test_recommended_is_the_smallest_that_is_about_as_good_as_the_baseline(
    qualities: dict[float, int], baseline: float | None, tolerance: float, size: int
) -> None:
    ledger = book_of(qualities, baseline, tolerance=tolerance)
    chosen = ledger.front.recommended()
    assert chosen is not None
    assert chosen.measures["nonzero_params"] == size
    result = SearchResult("s", ledger, ledger.front.members(), 0.0, "", interrupted=False)
    report = as_json(result)
    assert report["tolerance"] == tolerance
    assert report["recommended"] == pick(report, "recommended")
    assert report["recommended"]["nonzero_params"] == size
    near = baseline is not None and max(qualities) >= baseline - tolerance
    assert ledger.region.is_near(chosen) == near
    assert f"Recommended: {chosen.name}" in summary(result, "slimfront")
    assert ("and this is the best" in summary(result, "slimfront")) == (
        baseline is not None and not near
    )


def test_the_tolerance_is_relative_where_a_metric_is_no_share() -> None:
    ledger = book_of({100.0: 900, 104.0: 300, 106.0: 100}, 100.0, MSE, 0.05)
    chosen = ledger.front.recommended()
    assert chosen is not None
    assert chosen.measures["nonzero_params"] == 300


def test_recommended_of_an_old_report_is_its_knee() -> None:
    assert member_name(pick(FRONT, "recommended")) == "trial-002@20"


def test_recommended_of_those_that_are_good_enough_is_the_smallest_of_them() -> None:
    ledger = book_of({0.99: 900, 0.975: 300, 0.969: 100}, 0.98)
    result = SearchResult("s", ledger, ledger.front.members(), 0.0, "", interrupted=False)
    assert pick(as_json(result), "recommended", 0.98)["nonzero_params"] == 900
    assert pick(as_json(result), "recommended", 0.97)["nonzero_params"] == 300


def test_smallest_is_by_the_first_objective_that_is_no_metric() -> None:
    described = {
        name: OBJECTIVES[name].as_plain() for name in ("val_accuracy", "params", "nonzero_params")
    }
    sizes = {1: (500, 90, 0.97), 2: (400, 120, 0.96), 3: (700, 80, 0.98)}
    front = [
        member(f"trial-00{number}", 3, accuracy, nonzero) | {"total_params": params}
        for number, (params, nonzero, accuracy) in sizes.items()
    ]
    report = {"front": front, "described": described, "quality": "val_accuracy"}
    by_params = report | {"objectives": ["val_accuracy", "params"]}
    assert pick(by_params, "smallest")["trial"] == "trial-002"
    assert pick(by_params, "smallest", 0.965)["trial"] == "trial-001"
    by_nonzero = report | {"objectives": ["val_accuracy", "nonzero_params", "params"]}
    assert pick(by_nonzero, "smallest")["trial"] == "trial-003"
