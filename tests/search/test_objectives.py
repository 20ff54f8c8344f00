import math

import numpy as np
import pytest

from slimfront.search.config.objectives import OBJECTIVES, Direction, known_objectives, losses
from slimfront.trainables.tasks import Regression


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
