"""How the code reads, in figures: lengths, nodes of the syntax tree per line, branches, and which
modules have a test of their name; beside Optuna."""

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna

from benchmarks.common import Outcome, at_most, run

ROOT = Path(__file__).parent.parent
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.BoolOp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.Match,
)
"""Each counts as one branch of the function that it is in."""

MOST_BRANCHES = 12
MOST_NODES = 9.0

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measured:
    """A function: its lines of code, nodes and branches."""

    name: str
    lines: int
    nodes: int
    branches: int


def functions(file: Path) -> Iterator[Measured]:
    """All functions of a file, those within others too."""
    source = file.read_text()
    tree = ast.parse(source)
    without = _docstring_lines(tree) | _blank_lines(source)
    for node in ast.walk(tree):
        if isinstance(node, Function):
            inside = set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) - without
            parts = list(ast.walk(node))
            branches = sum(isinstance(part, BRANCHES) for part in parts)
            yield Measured(f"{file}:{node.name}", len(inside), len(parts), branches)


def _docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def _blank_lines(source: str) -> set[int]:
    lines = enumerate(source.split("\n"), start=1)
    return {number for number, line in lines if not line.strip()}


def modules(*folders: Path) -> list[Path]:
    """All modules below some folders."""
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def house(_arguments: argparse.Namespace) -> Outcome:
    """The figures of slimfront and of the Optuna that is installed."""
    ours = modules(ROOT / "search", ROOT / "trainables")
    theirs = modules(Path(optuna.__file__).parent)
    rows = [_row("slimfront", ours), _row("Optuna", theirs)]
    rows[0]["modules with a test of their name"] = f"{_tested(ours):.0%}"
    rows[1]["modules with a test of their name"] = ""
    found = [function for file in ours for function in functions(file)]
    dense = sum(f.nodes for f in found) / sum(f.lines for f in found)
    branchy = [function for function in found if function.branches > MOST_BRANCHES]
    goals = [
        at_most("nodes per line of functions", dense, MOST_NODES),
        at_most(f"functions with more than {MOST_BRANCHES} branches", len(branchy), 0),
    ]
    return Outcome(1, rows, goals)


def _row(name: str, files: list[Path]) -> dict[str, object]:
    sizes = [len(file.read_text().split("\n")) for file in files]
    found = [function for file in files for function in functions(file)]
    lengths = [function.lines for function in found]
    dense = sum(f.nodes for f in found) / sum(lengths)
    return {
        "code": name,
        "modules": len(files),
        "lines of a module, median / p90": _spread(sizes),
        "lines of a function, median / p90": _spread(lengths),
        "nodes per line of functions": f"{dense:.1f}",
        f"functions over {MOST_BRANCHES} branches": sum(
            function.branches > MOST_BRANCHES for function in found
        ),
    }


def _spread(values: list[int]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.0f} / {tenths[-1]:.0f}"


def _tested(files: list[Path]) -> float:
    """The share of modules, packages aside, with a test file of their name."""
    tests = {file.stem.removeprefix("test_") for file in (ROOT / "tests").rglob("test_*.py")}
    named = [file.stem for file in files if file.stem != "__init__"]
    return sum(name in tests for name in named) / len(named)


if __name__ == "__main__":
    run("house", house)
