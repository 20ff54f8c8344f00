"""The rooms stay apart: who may import whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.house import MOST_BRANCHES, functions

ROOT = Path(__file__).parent.parent

ROOMS = [
    # What is as basic as Python itself: no room.
    "torch_internals",
    *(
        "redaction",
        "environment",
        "errors",
        "folders",
        "gpu",
        "options",
        "importing",
        "inputs",
        "markdown",
        "plugins",
        "precision",
    ),
    "tasks",
    *("data", "models"),
    "structure",
    *("penalties", "sparsifiers", "measures"),
    *("compaction", "shipping"),
    "reconstruction",
    "depth",
    *("training", "candidate", "messages"),
    "post_training",
    *("packs", "distributed"),
    "trainable",
    "search.terminal",
    *("search.config", "search.record", "search.tracking", "search.engine", "search.cluster"),
    *("search.python_api", "search.cli"),
]
"""Each may import what stands before it, and its neighbours on the same line of `BESIDE`."""

BESIDE = {
    ("errors", "redaction"),
    ("penalties", "sparsifiers"),
    ("shipping", "compaction"),
    ("training", "candidate"),  # the options of a candidate stand beside what they configure
    ("options", "precision"),
    ("options", "importing"),
}

PRIVATE = (
    *("redaction", "environment", "errors", "folders", "gpu", "importing"),
    *("inputs", "markdown", "options", "plugins", "precision", "torch_internals"),
)


@cache
def modules() -> dict[str, Path]:
    """All modules of the product, by their names below `slimfront`."""
    found = {}
    for top in ("search", "trainables"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """The names of all modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("slimfront.") in modules()
                yield inner if is_module else node.module


def room(module: str) -> str | None:
    """The room of a module: a folder or a file at the top of `search` or `trainables`."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    return f"search.{parts[1]}" if parts[0] == "search" else parts[1]


def edges() -> set[tuple[str, str, str]]:
    """(room, room that it imports, which module does) of all that is imported between rooms."""
    found = set()
    for module, path in modules().items():
        for name in imports(path):
            if not name.startswith("slimfront."):
                continue
            here, there = room(module), room(name.removeprefix("slimfront."))
            if here and there and here != there:
                found.add((here, there, module))
    return found


def test_rooms_import_only_what_lies_below_them() -> None:
    found = edges()
    assert {name for edge in found for name in edge[:2]} == set(ROOMS)
    wrong = [
        f"{module} imports {there}"
        for here, there, module in sorted(found)
        if ROOMS.index(there) > ROOMS.index(here) and (here, there) not in BESIDE
    ]
    assert not wrong


def test_no_room_has_more_modules_than_one_can_keep_in_mind() -> None:
    for folder in {path.parent for path in modules().values()}:
        count = len(list(folder.glob("*.py"))) - 1
        assert count <= 15, f"{folder.relative_to(ROOT)} has {count} modules"


def test_no_function_has_more_branches_than_one_can_keep_in_mind() -> None:
    branchy = [
        f"{function.name}: {function.branches}"
        for path in modules().values()
        for function in functions(path)
        if function.branches > MOST_BRANCHES
    ]
    assert not branchy


def test_what_a_room_is_for_stands_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in {name for name in ROOMS if name not in PRIVATE}:
        shown = name.replace("search.", "search/") if "." in name else f"trainables/{name}"
        assert f"`{shown}" in text, f"CONTRIBUTING.md does not say what {shown} is for"


def test_everything_is_imported_under_one_name() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "docker").rglob("*.py")]
    for file in files:
        for name in imports(file):
            top = name.partition(".")[0]
            assert top not in ("search", "trainables"), f"{file.relative_to(ROOT)} imports {name}"


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_only_trainable_py_of_trainables_imports_ray_and_nothing_there_imports_search() -> None:
    files = [path for name, path in modules().items() if name.startswith("trainables.")]
    assert len(files) > 15
    for file in files:
        allowed = {"ray"} if file.name == "trainable.py" else set()
        found = top_levels(file) & {"ray", "optuna", "mlflow"}
        assert found <= allowed, f"{file.relative_to(ROOT)} imports {found - allowed}"
        assert not [name for name in imports(file) if name.startswith("slimfront.search")]


def test_only_tracking_imports_mlflow() -> None:
    importers = {name for name, path in modules().items() if "mlflow" in top_levels(path)}
    assert importers
    assert all(name.startswith("search.tracking") for name in importers), importers


UNDOCUMENTED = re.compile(
    r"ray\.(_private|_raylet|core\.generated|air\.execution|train\._internal)"
)
"""What Ray does not document: modules of its inside."""


def test_what_ray_does_not_document_is_imported_in_one_room_alone() -> None:
    importers = {
        name
        for name, path in modules().items()
        for imported in imports(path)
        if UNDOCUMENTED.match(imported)
    }
    assert importers
    assert all(name.startswith("search.engine.ray_internals.") for name in importers), importers


def test_a_candidate_trains_where_ray_optuna_and_mlflow_are_not_installed() -> None:
    program = """
import sys
for name in ("ray", "optuna", "mlflow", "slimfront.search"):
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


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("slimfront", ("torch", "ray", "optuna", "mlflow", "pandas", "pydantic")),
        ("slimfront.search.cli", ("torch", "ray", "optuna", "mlflow", "pandas")),
        ("slimfront.search.cluster.jobs", ("torch", "optuna", "mlflow", "ray.tune")),
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
