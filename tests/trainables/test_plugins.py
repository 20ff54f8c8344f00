"""Modules of the user's that register parts of a config, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUG_IN = """
from slimfront import PENALTIES, Penalty
@PENALTIES.register("my_l2")
class MyL2(Penalty):
    def attach(self, model, sample):
        raise NotImplementedError
"""
USE = """
from slimfront import Candidate, UserError
try:
    made = Candidate.model_validate({plain})
    print(sorted(made.penalties), made.plugins)
    again = Candidate.model_validate(made.model_dump(mode="json"))
    print(again == made)
except UserError as error:
    print("UserError:", error)
"""


def said(folder: Path, plain: str) -> str:
    """What a process in a folder prints that makes this candidate."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", USE.format(plain=plain)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, str(folder)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(folder: Path, value: str) -> None:
    """As if a distribution with this entry point was installed in the folder."""
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[slimfront.plugins]\nmine = {value}\n")


@pytest.mark.parametrize("named", ["['my_slim']", "'my_slim'"])
def test_a_plug_in_of_a_config_is_known_before_its_names_are_looked_up(
    tmp_path: Path, named: str
) -> None:
    (tmp_path / "my_slim.py").write_text(PLUG_IN)
    plain = f"{{'plugins': {named}, 'penalties': {{'my_l2': {{'strength': 1}}}}}}"
    assert said(tmp_path, plain) == "['my_l2'] ('my_slim',)\nTrue\n"


@pytest.mark.parametrize("value", ["my_slim", "my_slim:MyL2"])
def test_a_plug_in_that_is_installed_needs_no_name(tmp_path: Path, value: str) -> None:
    (tmp_path / "my_slim.py").write_text(PLUG_IN)
    installed(tmp_path, value)
    assert said(tmp_path, "{'penalties': {'my_l2': {'strength': 1}}}") == "['my_l2'] ()\nTrue\n"


def test_a_plug_in_that_is_installed_and_named_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / "my_slim.py").write_text(PLUG_IN)
    installed(tmp_path, "my_slim")
    assert said(tmp_path, "{'plugins': ['my_slim']}") == "[] ('my_slim',)\nTrue\n"


def test_one_that_is_installed_and_broken_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "my_slim.py").write_text("import nothing_like_it\n")
    installed(tmp_path, "my_slim")
    assert said(tmp_path, "{}") == (
        "UserError: the plug-in 'mine' (my_slim), which is installed, cannot be imported: "
        "ModuleNotFoundError: No module named 'nothing_like_it'\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "plugins: 'my_slim': there is no module 'my_slim'"),
        ("import nothing_like_it\n", "nothing_like_it"),
        ("raise ValueError('not here')\n", "ValueError: not here"),
        (PLUG_IN.replace("my_l2", "layer"), "penalty 'layer' is registered twice"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "my_slim.py").write_text(content)
    found = said(tmp_path, "{'plugins': ['my_slim']}")
    assert found.startswith("UserError: ") and found.count("\n") == 1
    assert message in found
