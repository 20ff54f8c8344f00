"""What benchmarks name of the code is there."""

import pytest

from benchmarks.where import DRIVER, TRIAL, owner_of


@pytest.mark.parametrize("place", [*TRIAL, *DRIVER])
def test_functions_with_a_clock_are_there(place: str) -> None:
    owner, name = owner_of(place)
    assert callable(getattr(owner, name))
