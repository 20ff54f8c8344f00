"""The rooms stay apart: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN_IN_TRAINABLES = {"ray", "optuna", "mlflow", "search"}


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_only_trainable_py_of_trainables_imports_ray_and_nothing_there_imports_search() -> None:
    files = list((ROOT / "trainables").rglob("*.py"))
    assert len(files) > 15
    for file in files:
        allowed = {"ray"} if file.name == "trainable.py" else set()
        found = imported_packages(file) & FORBIDDEN_IN_TRAINABLES
        assert found <= allowed, f"{file.relative_to(ROOT)} imports {found - allowed}"


def test_a_candidate_trains_where_ray_optuna_and_mlflow_are_not_installed() -> None:
    program = """
import sys
for name in ("ray", "optuna", "mlflow", "search"):
    sys.modules[name] = None  # importing it raises ImportError
from slimfront import Candidate, train
model = {"name": "mlp", "depth": 1, "width": 4}
trained = train(Candidate.model_validate({"model": model, "training": {"epochs": 1}}))
print(sorted(trained.measures))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "nonzero_params" in done.stdout


def test_only_tracking_imports_mlflow() -> None:
    importers = {
        f.relative_to(ROOT / "search")
        for f in (ROOT / "search").rglob("*.py")
        if "mlflow" in imported_packages(f)
    }
    assert importers
    assert all(path.parts[0] == "tracking" for path in importers), importers


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("search.cli", ("torch", "ray", "optuna", "mlflow", "pandas")),
        ("search.cluster", ("torch", "optuna", "mlflow", "ray.tune")),
    ],
)
def test_a_command_does_not_wait_for_imports_that_it_does_not_need(
    module: str, unneeded: tuple[str, ...]
) -> None:
    program = f"import sys, {module}\nprint([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=True,
    )
    assert done.stdout.strip() == "[]"
