"""Environment variables are as they were once the block that set them ends."""

import os

import pytest

from slimfront.trainables.environment import environment_set


def test_variables_are_set_within_and_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLIMFRONT_KNOWN", "before")
    monkeypatch.delenv("SLIMFRONT_NEW", raising=False)
    values = {"SLIMFRONT_KNOWN": "within", "SLIMFRONT_NEW": "1"}
    with environment_set(values):
        assert os.environ["SLIMFRONT_KNOWN"] == "within"
        assert os.environ["SLIMFRONT_NEW"] == "1"
    assert os.environ["SLIMFRONT_KNOWN"] == "before"
    assert "SLIMFRONT_NEW" not in os.environ


def test_they_are_as_before_also_where_the_block_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMFRONT_NEW", raising=False)
    with pytest.raises(RuntimeError, match="out of luck"), environment_set({"SLIMFRONT_NEW": "1"}):
        raise RuntimeError("out of luck")
    assert "SLIMFRONT_NEW" not in os.environ
