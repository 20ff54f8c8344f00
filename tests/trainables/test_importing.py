import sys
from pathlib import Path

import pytest

from slimfront.trainables.data import Digits
from slimfront.trainables.errors import UserError
from slimfront.trainables.importing import import_by_path


def test_a_path_names_a_function_a_class_or_a_method() -> None:
    assert import_by_path("slimfront.trainables.data:Digits", "thing") is Digits
    assert import_by_path("slimfront.trainables.data.digits:Digits.load", "thing") is Digits.load


def test_the_working_directory_is_searched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    Path("module_beside_the_config.py").write_text("def make():\n    return 5\n")
    assert import_by_path("module_beside_the_config:make", "thing")() == 5


@pytest.mark.parametrize(
    "path",
    [
        "slimfront.trainables.data.Digits",
        "slimfront.trainables.data:",
        ":load",
        "a b:c",
        "data.py:load/x",
        "",
        "a:b:c",
    ],
)
def test_another_form_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"has the form package.module:name"):
        import_by_path(path, "model")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere:load", "thing 'nowhere:load': there is no module 'nowhere'"),
        ("slimfront.trainables.nowhere:load", "there is no module 'slimfront.trainables.nowhere'"),
        ("slimfront.trainables.data:Digit", "there is no 'Digit' in it; did you mean 'Digits'"),
        (
            "slimfront.trainables.data:DATA",
            "it is a Registry, and it must be a function or a class to call",
        ),
    ],
)
def test_what_is_not_there_or_cannot_be_called_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_by_path(path, "thing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
        (
            "import no_such_module_anywhere\n",
            "cannot be imported: No module named 'no_such_module_anywhere'",
        ),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("import sys\nsys.exit(2)\n", "cannot be imported: SystemExit: 2"),
    ],
)
def test_a_module_that_fails_is_told_from_one_that_is_missing(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "failing_module.py").write_text(text)
    with pytest.raises(UserError, match=message):
        import_by_path("failing_module:load", "thing")
