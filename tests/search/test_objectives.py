import math

import numpy as np
import pytest

from slimfront.search.config.objectives import (
    OBJECTIVES,
    Direction,
    Objective,
    known_objectives,
    losses,
)
from slimfront.trainables.measures.described import Measure, Scale
from slimfront.trainables.tasks import Regression
from slimfront.trainables.tasks.metrics import Better


def test_accuracies_are_maximised_and_sizes_minimised() -> None:
    maximised = {
        name for name, objective in OBJECTIVES.items() if objective.direction is Direction.MAXIMIZE
    }
    assert maximised == {"val_accuracy", "speedup"}


def test_losses_are_one_at_the_reference_and_smaller_is_better() -> None:
    accuracy, size = OBJECTIVES["val_accuracy"], OBJECTIVES["params"]
    assert accuracy.loss(0.0, math.nan) == 1
    assert accuracy.loss(0.9, math.nan) == pytest.approx(0.1)
    assert size.loss(1000, 1000) == 1
    assert size.loss(100, 1000) == pytest.approx(math.log(101) / math.log(1001))
    assert size.loss(0, 1000) == 0


def test_times_are_ratios_to_the_dense_network() -> None:
    speedup, latency = OBJECTIVES["speedup"], OBJECTIVES["latency_ms"]
    assert [speedup.loss(x, 1.0) for x in (1.0, 4.0, 0.5)] == [1.0, 0.25, 2.0]
    assert latency.loss(0.2, 0.8) == pytest.approx(0.25)
    assert speedup.loss(0.0, 1.0) == math.inf


def test_metrics_that_are_not_in_0_to_1_are_relative_to_the_dense_network() -> None:
    known = known_objectives(Regression(metrics=[{"name": "mse"}, {"name": "r2"}]))
    error, r2 = known["val_mse"], known["val_r2"]
    assert [error.loss(x, 40.0) for x in (0.0, 40.0, 80.0, 120.0)] == [0, 0.5, 1, 1.5]
    # Whatever the sign, as good as dense is at a half, and better is further from the reference.
    assert [r2.loss(x, -0.5) for x in (-1.0, -0.5, 0.0, 1.0)] == [1, 0.5, 0, -1]
    assert [r2.loss(x, 0.5) for x in (0.0, 0.5, 1.0)] == [1, 0.5, 0]
    assert r2.loss(0.5, 0.0) < r2.loss(0.0, 0.0) == 0.5
    assert error.near(40.0, 0.02) == pytest.approx(40.8)
    assert r2.near(-0.5, 0.02) == pytest.approx(-0.51)


def test_a_missing_measure_becomes_nan() -> None:
    chosen = [OBJECTIVES["val_accuracy"], OBJECTIVES["layers"]]
    table = losses(
        [{"val_accuracy": 0.5, "layers": 4}, {"val_accuracy": 0.5}], chosen, {"layers": 4}
    )
    assert table.shape == (2, 2)
    assert table[0].tolist() == [0.5, 1.0]
    assert np.isnan(table[1, 1])


def objective(better: Better, scale: Scale = "relative") -> Objective:
    return Objective(Measure("val_own", better, scale=scale, quality=True))


@pytest.mark.parametrize(
    ("better", "dense", "value", "loss"),
    [
        ("smaller", 4.0, 4.0, 0.5),  # as good as dense
        ("smaller", 4.0, 8.0, 1.0),  # an error twice as large is at the reference
        ("smaller", 4.0, 0.0, 0.0),  # no error at all
        ("smaller", 4.0, 12.0, 1.5),
        ("larger", -2.0, -2.0, 0.5),  # a log-likelihood: negative, and larger is better
        ("larger", -2.0, -4.0, 1.0),
        ("larger", -2.0, -1.0, 0.25),
        ("larger", 0.6, 0.3, 0.75),  # an R²
        ("larger", 0.6, -0.6, 1.5),  # which may be negative where dense is not
        ("larger", 1e6, 2e6, 0.0),  # unbounded
        ("smaller", 0.0, 0.5, 0.75),  # nothing can be relative to 0
    ],
)
def test_metrics_without_bounds_count_relative_to_the_dense_network(
    better: Better, dense: float, value: float, loss: float
) -> None:
    assert objective(better).loss(value, dense) == pytest.approx(loss)


@pytest.mark.parametrize("better", ["larger", "smaller"])
@pytest.mark.parametrize("scale", ["share", "relative", "ratio", "log"])
@pytest.mark.parametrize("dense", [0.5, 3.0])
def test_what_is_better_has_the_smaller_loss_on_every_scale(
    better: Better, scale: Scale, dense: float
) -> None:
    one = objective(better, scale)
    values = sorted([0.1, 0.4, 0.9], key=one.goodness)
    found = [one.loss(value, dense) for value in values]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    assert [one.as_good(values[1], value) for value in values] == [True, True, False]
    assert one.as_good(one.near(0.9, 0.1), 0.9) is False
    assert one.as_good(0.9, one.near(0.9, 0.1))


def test_an_error_in_zero_to_one_counts_as_it_is() -> None:
    assert objective("smaller", "share").loss(0.2, math.nan) == 0.2


def test_an_objective_comes_back_from_plain_data() -> None:
    for one in (objective("smaller"), *OBJECTIVES.values()):
        assert Objective.from_plain(one.as_plain() | {"of a later version": 1}) == one


def test_nothing_of_what_should_be_large_is_no_win() -> None:
    for scale in ("ratio", "log", "inverse"):
        assert objective("larger", scale).loss(0.0, 2.0) == math.inf
    for scale in ("ratio", "log"):
        assert objective("smaller", scale).loss(0.0, 0.0) == 1
        assert objective("smaller", scale).loss(0.1, 0.0) == math.inf
    assert objective("larger", "log").loss(2.0, 2.0) == pytest.approx(1)


@pytest.mark.parametrize("scale", ["ratio", "log"])
@pytest.mark.parametrize("dense", [1e-6, 0.3, 1.0, 1e9])
def test_the_dense_network_is_at_the_reference_however_small_its_measure_is(
    scale: Scale, dense: float
) -> None:
    for better in ("larger", "smaller"):
        assert objective(better, scale).loss(dense, dense) == pytest.approx(1)
    assert objective("smaller", scale).loss(dense / 2, dense) < 1


@pytest.mark.parametrize("dense", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("better", ["larger", "smaller"])
def test_a_metric_that_the_dense_network_has_none_of_is_relative_to_1(
    better: Better, dense: float
) -> None:
    one = objective(better)
    values = sorted([-2.0, 0.0, 3.0], key=one.goodness)
    found = [one.loss(value, dense) for value in values]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    assert math.isnan(one.loss(math.nan, dense))
