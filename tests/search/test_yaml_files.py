"""Text that is made to do harm, and files that are none, are refused within bounds of time and
memory."""

import os
import time
from pathlib import Path

import pytest

from slimfront.search.config.yaml_files import GIVEN, RECORDED, parse, read_text, write
from slimfront.trainables.errors import UserError

BOMB = "\n".join(
    ["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "c, line 6: it has more than 10,000 values"),
        ("a: &a [1, *a]", r"c, line 1: the alias '\*a' stands inside of what it names"),
        ("a: &a {b: *a}", r"c, line 1: the alias '\*a' stands inside of what it names"),
        ("[" * 5_000, "c, line 1: it is nested in more than 32 levels"),
        ("a: " + "x" * 10_001, "c, line 1: a value has more than 10,000 characters"),
        ("k" * 301 + ": 1", "c, line 1: a key has more than 300 characters"),
        (
            "\n".join(f"k{n}: 1" for n in range(6_000)),
            "c, line 5000: it has more than 10,000 values",
        ),
        ("a: " + "9" * 5_000, "c, line 1: '999.* … 999.*' is not a whole number, or one too large"),
        ("a: 9223372036854775808", "c, line 1: the whole number 9223372036854775808 is too large"),
        ("a: !!int x", "c, line 1: 'x' is not a whole number"),
        ("a: !!float x", "c, line 1: 'x' is not a number"),
        ("a: !!bool x", "c, line 1: 'x' is not true or false"),
        ("a: !!map x", "c, line 1: this is not a mapping"),
        ("a: !!timestamp x", "c, line 1: 'x' is of the kind 'tag:yaml.org,2002:timestamp'"),
        (
            "a: !!python/object/apply:os.system [id]",
            "c, line 1: this is of the kind 'tag:yaml.org,2002:python/object/apply:os.s",
        ),
        ('a: "\\ud800"', "c, line 1: a value has half of a character"),
        ("a: \udcff", "c: this is not YAML: special characters are not allowed"),
        ("? [a]\n: 1", "c, line 1: a key is a list or a mapping"),
        ("<<: {a: 1}", "c, line 1: '<<' is of the kind 'tag:yaml.org,2002:merge'"),
        ("x" * 200_001, "c: it has more than 200,000 characters"),
    ],
)
def test_harmful_text_is_refused_at_once(text: str, expected: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{expected}"):
        parse(text, "c")
    assert time.monotonic() - began < 2


def test_a_date_is_text_whether_there_is_such_a_day_or_not() -> None:
    assert parse("[2026-01-31, 2024-13-45]", "c") == ["2026-01-31", "2024-13-45"]


def test_a_key_that_yaml_1_1_takes_for_a_boolean_is_text() -> None:
    assert parse("{on: onnx, no: yes}", "c") == {"on": "onnx", "no": True}
    assert parse(write({"on": {"off": 1}}), "c") == {"on": {"off": 1}}


def test_aliases_within_bounds_are_taken() -> None:
    assert parse("a: &a {x: 1}\nb: [*a, *a]", "c") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}]}


def test_what_is_written_reads_back_as_it_was() -> None:
    shared = {"low": 1e-9}
    tree = {
        "text": ["1e-3", "2026-01-31", "null", "1", "a: b", "é\n "],
        "numbers": [1e-3, 2, 1e300],
        "a": shared,
        "b": shared,
    }
    text = write(tree)
    assert parse(text, "c") == tree
    assert "&" not in text


def test_a_recorded_config_may_be_longer() -> None:
    text = "\n".join(f"k{n}: 1" for n in range(6_000))
    assert len(parse(text, "c", RECORDED)) == 6_000


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_a_device_is_no_config(device: str) -> None:
    with pytest.raises(
        UserError, match=f"cannot read the config {device}: it is not a regular file"
    ):
        read_text(Path(device))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match="it is not a regular file"):
            read_text(tmp_path / name)


def test_no_more_is_read_of_a_file_than_a_config_may_have(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.touch()
    os.truncate(file, 50_000_000_000)
    with pytest.raises(UserError, match="it has more than 200,000 bytes"):
        read_text(file)
    os.truncate(file, GIVEN.size)
    assert len(read_text(file)) == GIVEN.size


def test_a_key_that_yaml_1_1_reads_as_true_is_the_text_that_it_is() -> None:
    assert parse("measures: {kb: {factory: a:b, on: onnx}}", "it") == {
        "measures": {"kb": {"factory": "a:b", "on": "onnx"}}
    }
    assert parse("{on: 1, off: 2, no: 3, 'yes': 4}", "it") == {"on": 1, "off": 2, "no": 3, "yes": 4}
    assert parse(write({"on": True, "x": "on"}), "it") == {"on": True, "x": "on"}
