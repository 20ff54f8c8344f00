"""One importable name: in the wheel, from another directory, and beside a user's modules."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import SMALL_CONFIG

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in its tree
    source.mkdir()
    for name in ("search", "trainables", "slimfront"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", folder, source], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("slimfront-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_all_modules_under_one_name_and_the_licence(wheel: Path) -> None:
    names = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"slimfront"}
    inside = {path.relative_to(wheel / "slimfront") for path in wheel.rglob("*.py")}
    wanted = {
        path.relative_to(ROOT)
        for top in ("search", "trainables")
        for path in (ROOT / top).rglob("*.py")
    }
    own = {path.relative_to(ROOT / "slimfront") for path in (ROOT / "slimfront").glob("*.py")}
    for path in (ROOT / "slimfront" / "integrations").glob("*.py"):
        own.add(path.relative_to(ROOT / "slimfront"))
    assert inside == wanted | own
    assert (wheel / "slimfront" / "py.typed").is_file()
    assert [path.name for path in wheel.rglob("LICENSE")] == ["LICENSE"]


MINE = "raise AssertionError('this module is not asked for')\n"
NETWORK = """
from search import grid
from trainables import width
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, grid))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose own modules are called as the rooms of ours, one of which its factory
    uses."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").write_text("grid = 10\n")
    (tmp_path / "search.py").write_text(MINE)  # a package goes before a module of the same name
    (tmp_path / "trainables.py").write_text("width = 12\n")
    (tmp_path / "my_net.py").write_text(NETWORK)
    config = SMALL_CONFIG | {
        "model": {"name": "factory", "factory": "my_net:build"},
        "space": {"sparsifier.sparsity": {"low": 0.1, "high": 0.9}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
        "penalties": {},
        "search": {"trials": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def slimfront(project: Path, *arguments: str, path: Path = ROOT) -> str:
    """Runs the command as from an install at `path`, and gives what it printed."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slimfront", *arguments],
        capture_output=True,
        text=True,
        cwd=project,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_project_may_call_its_modules_as_our_rooms(project: Path, wheel: Path) -> None:
    found = searched(project, wheel)
    assert len(found["front"]) >= 1


def searched(project: Path, wheel: Path) -> dict[str, Any]:
    """What the search `one` of the project ended with."""
    arguments = ["search", "job.yaml", "--name", "one", "--json"]
    found: dict[str, Any] = json.loads(slimfront(project, *arguments, path=wheel))
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_of_such_a_project_is_resumed_and_exported(project: Path, wheel: Path) -> None:
    searched(project, wheel)
    more = ["resume", "one", "--set", "search.trials=3", "--json"]
    resumed = json.loads(slimfront(project, *more, path=wheel))
    assert resumed["trials"]["completed"] == 3
    slimfront(project, "export", "one", "--output", "net.onnx", "--pick", "smallest", path=wheel)
    assert (project / "net.onnx").is_file()


def test_the_python_interface_is_what_the_package_says(tmp_path: Path) -> None:
    program = """
import slimfront
from slimfront.trainables.candidate import Candidate
assert slimfront.Candidate is Candidate
without_ray = [name for name in slimfront.__all__ if name != "MultiObjectiveASHA"]
registries = [name for name in without_ray if name.isupper()]
assert all(len(getattr(slimfront, name)) > 2 for name in registries), registries
others = [name for name in without_ray if name not in registries]
assert all(callable(getattr(slimfront, name)) for name in others), others
assert "ray" not in __import__("sys").modules
assert callable(slimfront.MultiObjectiveASHA)
try:
    slimfront.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'slimfront' has no attribute 'nothing'\n"
