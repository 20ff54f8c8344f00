"""Hundreds of configs that are broken by accident or on purpose: a config, or one sentence on one
line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.broken_configs import draw
from slimfront.search.config.loading import load, load_recorded
from slimfront.search.config.plain import dump
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG

ROOT = Path(__file__).parents[2]


@given(number=st.integers(0, 10**9))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_config_is_one_sentence_on_one_line(tmp_path: Path, number: int) -> None:
    broken = draw(number)
    file = tmp_path / "config.yaml"
    file.write_bytes(broken.content)
    began = time.monotonic()
    try:
        config = load(file, broken.overrides)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert load_recorded(dump(config)) == config
    assert len(message) <= 480 and message.isprintable()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epochs.x=1", "'epochs' is 2, which has no 'x'"),
        (
            "space.model.depth.low.x=1",
            "--set space.model.depth.low.x=1: 'low' is 1, which has no 'x'",
        ),
        (
            "space.sparsifier.sparsity=5",
            "'space.sparsifier.sparsity': it should be a mapping of keys to values, and it is 5",
        ),
        (
            "data={name: huggingface, path: ~nouser/x}",
            "'data.path': '~nouser/x' cannot be a path: Could not determine home",
        ),
        ("search.time=" + "9" * 400 + "d", "'search.time': it must be at most 1000 days"),
        (
            "resources.memory=" + "9" * 400 + "GB",
            "'resources.memory': it should be less than 9007199254740992",
        ),
        ("space.training.lr={low: 0.1, high: 0.9, step: 5e-324}", "step (5e-324) is too small"),
        ("space.model.width={low: 1, high: 9, step: 1e-300}", "step (1e-300) is too small"),
        (
            "search.start_from=[{model.dept: 3}]",
            "search.start_from[0]: 'model.dept' does not vary; did you mean 'model.depth'?",
        ),
        (
            "search.start_from=[{model.depth: .nan}]",
            "search.start_from[0]: nan is outside of what 'model.depth' varies in",
        ),
        ("search.start_from=[" + "{model.depth: 2}," * 1001 + "]", "'search.start_from"),
        (
            "space.training.lr={choices: [" + "1," * 1001 + "]}",
            "it has 1,007 choices and ends of ranges",
        ),
        (
            "name=" + "x" * 9_000,
            "'name': 'xxxxxxxxxxxxxxxxxxxxxxxxxxxx … xxxxxxxxxxxxxxxxxxxxxxxxxxxx' cannot name a "
            "directory",
        ),
        ('name="a\\nb"', "'name': 'a\\nb' cannot name a directory"),
        ("a." * 40 + "a=1", "a path has at most 300 characters and 32 parts"),
    ],
)
def test_values_that_broke_something_are_explained(
    tmp_path: Path, override: str, expected: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        yaml.safe_dump(
            SMALL_CONFIG | {"space": SMALL_CONFIG["space"] | {"model.depth": {"low": 1, "high": 4}}}
        )
    )
    with pytest.raises(UserError) as caught:
        load(file, [override])
    assert expected in str(caught.value)
    assert len(str(caught.value)) <= 480
    assert str(caught.value).isprintable()


def test_a_typo_in_the_space_is_named_also_with_starts(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    space = {"model.depht": {"low": 1, "high": 4}}
    file.write_text(
        yaml.safe_dump(
            SMALL_CONFIG | {"space": space, "search": {"start_from": [{"model.depht": 2}]}}
        )
    )
    with pytest.raises(
        UserError,
        match=r"space 'model\.depht': in 'model': unknown key 'depht'; did you mean 'depth'\?",
    ):
        load(file)


def test_whatever_is_raised_while_a_config_is_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(SMALL_CONFIG))
    for error in (RecursionError("too\ndeep"), MemoryError(), AttributeError("x" * 9_000)):
        monkeypatch.setattr(
            "slimfront.search.config.loading.parse",
            lambda *_, error=error: (_ for _ in ()).throw(error),
        )
        with pytest.raises(
            UserError, match=f"this config cannot be used \\({type(error).__name__}: "
        ) as caught:
            load(file)
        assert len(str(caught.value)) <= 480
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("file", ["/dev/zero", "no\nsuch"])
def test_the_command_ends_with_one_line_and_exit_code_2(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slimfront", "check", "--no-build", file],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("Error: cannot read the config ")
