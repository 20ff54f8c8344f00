"""Weights that are fitted stay where they are told to, and are the best there are."""

import pytest
import torch
from torch import Tensor

from slimfront.trainables.reconstruction.least_squares import fitted, ridge_of


def by_hand(x: Tensor, y: Tensor, given: Tensor, free: Tensor) -> Tensor:
    """One output after the other, by the normal equations."""
    ridge = ridge_of(x.t() @ x)
    found = given.clone()
    for output in range(len(given)):
        places = free[output]
        others = x[:, ~places] @ given[output, ~places]
        within = x[:, places]
        left = within.t() @ (y[:, output] - others) + ridge[places] * given[output, places]
        matrix = within.t() @ within + ridge[places].diag()
        found[output, places] = torch.linalg.solve(matrix, left)
    return found


@pytest.mark.parametrize("kind", ["all", "some inputs", "each its own", "whole outputs stay"])
@pytest.mark.parametrize("rows", [200, 5])
def test_it_is_the_solution_of_the_normal_equations(kind: str, rows: int) -> None:
    x = torch.randn(rows, 9)
    x[:, 1] += x[:, 0]
    y, given = torch.randn(rows, 6), torch.randn(6, 9)
    free = torch.ones(6, 9, dtype=torch.bool)
    if kind == "some inputs":
        free[:, [2, 5]] = False
    elif kind == "each its own":
        free = torch.rand(6, 9) > 0.4
    elif kind == "whole outputs stay":
        free[[0, 3]] = False
    found = fitted(x[None], y[None], given[None], free[None], steps=60)[0]
    torch.testing.assert_close(found, by_hand(x, y, given, free), rtol=1e-3, atol=1e-4)
    assert torch.equal(found[~free], given[~free])


def test_groups_are_regressions_of_their_own() -> None:
    x, y, given = torch.randn(3, 60, 4), torch.randn(3, 60, 2), torch.randn(3, 2, 4)
    free = torch.rand(3, 2, 4) > 0.3
    found = fitted(x, y, given, free, steps=60)
    for group in range(3):
        alone = by_hand(x[group], y[group], given[group], free[group])
        torch.testing.assert_close(found[group], alone, rtol=1e-3, atol=1e-4)


def test_an_input_that_is_hardly_ever_there_gets_no_large_weight() -> None:
    x = torch.randn(1, 200, 5)
    x[..., 3] = 0
    x[:, 7, 3] = 1e-5
    given, free = torch.randn(1, 4, 5), torch.ones(1, 4, 5, dtype=torch.bool)
    found = fitted(x, torch.randn(1, 200, 4), given, free)
    torch.testing.assert_close(found[..., 3], given[..., 3], rtol=0.01, atol=0.01)


def test_an_input_that_is_always_0_keeps_its_weights() -> None:
    x = torch.randn(1, 50, 4)
    x[..., 2] = 0
    given = torch.randn(1, 3, 4)
    free = torch.ones(1, 3, 4, dtype=torch.bool)
    found = fitted(x, torch.randn(1, 50, 3), given, free)
    assert torch.equal(found[..., 2], given[..., 2])
    nothing = fitted(torch.zeros(1, 9, 4), torch.randn(1, 9, 3), given, free)
    assert torch.equal(nothing, given)
