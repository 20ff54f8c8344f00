"""What a network has over the dense one is told in words."""

import pytest

from slimfront.search.config.objectives import OBJECTIVES, Objective
from slimfront.search.record.front.gains import gains
from slimfront.search.record.trials import MeasuredNetwork, TrialRecord
from slimfront.trainables.measures.described import Measure

ACCURACY = OBJECTIVES["val_accuracy"]


def network(quality: float, *, name: str = "val_accuracy", **measures: float) -> MeasuredNetwork:
    measured = {name: quality, "nonzero_params": 1000.0, "params": 1000.0} | measures
    return MeasuredNetwork(TrialRecord(0, {}, 0), 3, measured, [], None)


def test_sizes_are_shares_of_the_dense_network_and_quality_differs_by_points() -> None:
    small = network(0.95, nonzero_params=50.0, params=382.0)
    said = gains(small, network(0.953), ACCURACY)
    shares = "5.0% of the non-zero weights, 38.2% of the parameters"
    assert said == f"{shares}, -0.3 points of validation accuracy"


def test_a_difference_has_the_error_of_both_qualities() -> None:
    small, dense = network(0.90), network(0.88)
    small.tested = {"val_accuracy_se": 0.003}
    assert "±" not in gains(small, dense, ACCURACY)
    dense.tested = {"val_accuracy_se": 0.004}
    assert "+2 ± 0.5 points" in gains(small, dense, ACCURACY)


def test_with_replicas_the_means_differ_and_the_error_is_that_of_means() -> None:
    small, dense = network(0.99), network(0.5)
    for one, middle in ((small, 0.9), (dense, 0.8)):
        for seed, off in enumerate((-0.02, 0.0, 0.02, 0.0)):
            one.replicas[seed] = {"val_accuracy": middle + off, "nonzero_params": 1.0}
    of_a_mean = (2 * 0.02**2 / 3) ** 0.5 / 4**0.5
    error = 100 * 2**0.5 * of_a_mean
    assert f"+10 ± {error:.2g} points" in gains(small, dense, ACCURACY)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({"speedup": 2.61}, "2.6 times as fast"),
        ({"latency_ms": 0.5}, "2 times as fast"),
        ({}, None),
    ],
)
def test_the_speed_is_told_where_it_was_taken(times: dict[str, float], said: str | None) -> None:
    small = network(0.9, **times)
    found = gains(small, network(0.9, latency_ms=1.0), ACCURACY)
    assert (said or "") in found
    assert ("as fast" in found) == (said is not None)


def test_times_in_quiet_count_where_there_are_any() -> None:
    small = network(0.9, speedup=3.0)
    small.timed_again = {"speedup": 1.5}
    assert "1.5 times as fast" in gains(small, network(0.9), ACCURACY)


def test_a_metric_that_is_no_share_differs_in_its_unit_and_may_have_no_value() -> None:
    mse = Objective(Measure("val_mse", "smaller", "validation MSE", scale="relative", quality=True))
    dense = network(2.0, name="val_mse")
    assert gains(network(2.5, name="val_mse"), dense, mse).endswith("+0.5 validation MSE")
    assert "MSE" not in gains(network(float("nan"), name="val_mse"), dense, mse)
