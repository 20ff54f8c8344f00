"""Weights that are fitted stay where they are told to, and are the best there are."""

import pytest
import torch
from torch import Tensor

from slimfront.trainables.reconstruction.least_squares import RIDGE, fitted


def by_hand(x: Tensor, y: Tensor, given: Tensor, free: Tensor) -> Tensor:
    """One output after the other, by the normal equations."""
    ridge = RIDGE * x.square().sum(0)
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
    x = torch.randn(rows, 9).double()
    x[:, 1] += x[:, 0]
    y, given = torch.randn(rows, 6).double(), torch.randn(6, 9).double()
    free = torch.ones(6, 9, dtype=torch.bool)
    if kind == "some inputs":
        free[:, [2, 5]] = False
    elif kind == "each its own":
        free = torch.rand(6, 9) > 0.4
    elif kind == "whole outputs stay":
        free[[0, 3]] = False
    found = fitted(x, y, given, free)
    torch.testing.assert_close(found, by_hand(x, y, given, free), rtol=1e-3, atol=1e-4)
    assert torch.equal(found[~free], given[~free])


def test_an_input_that_is_always_0_keeps_its_weights() -> None:
    x = torch.randn(50, 4)
    x[:, 2] = 0
    given = torch.randn(3, 4)
    found = fitted(x, torch.randn(50, 3), given, torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(found[:, 2], given[:, 2].double())
    nothing = fitted(torch.zeros(9, 4), torch.randn(9, 3), given, torch.ones(3, 4).bool())
    assert torch.equal(nothing, given.double())
