import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimfront.search.record.front.pareto import hypervolume, ranks

clouds = st.integers(1, 3).flatmap(
    lambda m: arrays(
        np.float64, st.tuples(st.integers(0, 12), st.just(m)), elements=st.integers(0, 5)
    )
)


def slow_non_dominated(points: np.ndarray) -> list[bool]:
    return [not any((q <= p).all() and (q < p).any() for q in points) for p in points]


@given(clouds)
def test_the_front_agrees_with_the_definition_ties_included(points: np.ndarray) -> None:
    assert (ranks(points) == 0).tolist() == slow_non_dominated(points)


def test_no_points_give_an_empty_front_of_no_volume() -> None:
    assert ranks(np.empty((0, 2))).tolist() == []
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0


def test_nan_and_infinity_are_never_on_the_front_and_hide_nothing() -> None:
    points = np.array([[np.nan, 0.0], [1.0, 1.0], [-np.inf, 2.0], [np.inf, 0.0]])
    assert ranks(points).tolist() == [-1, 0, -1, -1]
    assert hypervolume(points, np.array([2.0, 2.0])) == 1.0


def test_equal_points_are_all_on_the_front() -> None:
    assert ranks(np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 3.0]])).tolist() == [0, 0, 1]


def test_hypervolume_of_boxes_known_by_hand() -> None:
    reference = np.array([1.0, 1.0])
    assert hypervolume(np.array([[0.5, 0.5]]), reference) == pytest.approx(0.25)
    assert hypervolume(np.array([[0.2, 0.6], [0.6, 0.2]]), reference) == pytest.approx(
        2 * 0.8 * 0.4 - 0.4 * 0.4
    )
    assert hypervolume(np.array([[0.0, 1.0], [1.5, 0.1]]), reference) == 0
    assert hypervolume(np.array([[0.5, 0.5, 0.5]]), np.ones(3)) == pytest.approx(0.125)


@given(clouds)
def test_hypervolume_agrees_with_counting_unit_cells(points: np.ndarray) -> None:
    edges = np.stack(
        np.meshgrid(*[np.arange(6)] * points.shape[1], indexing="ij"), axis=-1
    ).reshape(-1, points.shape[1])
    covered = sum(bool((points <= cell).all(axis=1).any()) for cell in edges)
    assert hypervolume(points, np.full(points.shape[1], 6.0)) == pytest.approx(covered)
