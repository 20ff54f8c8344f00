"""Which versions of Python, torch, Ray and MLflow the fast tests pass with: `make versions`.

An environment is made for each combination at the ends of the ranges in pyproject.toml, with the
pins of constraints.txt for all else, and removed afterwards. It takes long and a lot of disk.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Goal, Outcome, run

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Combination:
    """Versions that an environment is made of."""

    python: str
    torch: str
    ray: str
    mlflow: str


COMBINATIONS = (
    Combination("3.11", "2.13.0", "2.58.0", "3.15.0"),
    Combination("3.11", "2.13.0", "2.59.0", "3.16.1"),
    Combination("3.11", "2.13.0", "2.60.0", "3.17.2"),
    Combination("3.11", "2.9.1", "2.58.0", "3.15.0"),
    Combination("3.11", "2.14.1", "2.60.0", "3.17.2"),
    Combination("3.12", "2.13.0", "2.58.0", "3.15.0"),
    Combination("3.12", "2.14.1", "2.60.0", "3.17.2"),
    Combination("3.13", "2.14.1", "2.60.0", "3.17.2"),
)

FAST = (
    *("tests/test_undocumented.py", "tests/search/test_searcher.py"),
    *("tests/search/test_scheduler.py", "tests/search/test_study.py", "tests/search/test_slots.py"),
    *("tests/search/test_packing.py", "tests/search/tracking/test_store.py"),
    *("tests/search/tracking/test_recorder.py", "tests/trainables/structure"),
    *("tests/trainables/test_graph.py", "tests/trainables/test_encoders.py"),
    *("tests/trainables/test_optimizers.py", "tests/trainables/test_network_file.py"),
    *("tests/trainables/shipping/test_kernels.py", "tests/trainables/packs/test_packable.py"),
)
"""The tests of what touches these libraries most, and start no clusters of their own."""


def versions(arguments: argparse.Namespace) -> Outcome:
    """Runs the fast tests with combinations of versions."""
    wanted = [c for c in COMBINATIONS if not arguments.only or _is_named(c, arguments.only)]
    results = {} if arguments.again else _results()
    for combination in wanted[: 1 if arguments.quick else None]:
        results[combination] = _tried(combination)
        print(f"{combination}: {results[combination]}", file=sys.stderr, flush=True)
    rows = [_row(c, results.get(c, "not run")) for c in COMBINATIONS]
    failed = sum("failed" in result or "error" in result for result in results.values())
    goal = Goal("combinations that were run and failed", failed, "<= 0", failed == 0)
    return Outcome(1, rows, [goal])


def _is_named(combination: Combination, only: list[str]) -> bool:
    """Whether each of `only`, such as `torch=2.13.0`, is true of a combination."""
    values = vars(combination)
    return all(values[name] == value for name, _, value in (each.partition("=") for each in only))


def _row(combination: Combination, result: str) -> dict[str, Any]:
    names = {"python": "Python", "torch": "torch", "ray": "Ray", "mlflow": "MLflow"}
    row = {shown: getattr(combination, name) for name, shown in names.items()}
    return row | {"fast tests": result}


def _results() -> dict[Combination, str]:
    """What the table in the docs says of combinations that were run before."""
    table = re.search(
        r"<!-- versions -->(.*?)<!-- /versions -->", (ROOT / "docs" / "python.md").read_text(), re.S
    )
    found = {}
    for line in table[1].splitlines() if table else ():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 5 and (combination := Combination(*cells[:4])) in COMBINATIONS:
            found[combination] = cells[4]
    return {c: result for c, result in found.items() if result != "not run"}


def _tried(combination: Combination) -> str:
    """How the fast tests went, in a few words; or why there is no such environment here."""
    python = _python(combination.python)
    if python is None:
        return f"not run: there is no Python {combination.python} here"
    with tempfile.TemporaryDirectory(prefix="versions") as name:
        environment = Path(name)
        subprocess.run([python, "-m", "venv", environment], check=True)
        why_not = _install(environment, combination)
        if why_not:
            return f"not run: {why_not}"
        _install_slimfront(environment)
        return _tested(environment)


def _python(version: str) -> str | None:
    """The path of an interpreter of that version: on PATH, or among pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        if said.stdout.startswith(f"Python {version}."):
            return candidate
    return None


def _install(environment: Path, combination: Combination) -> str | None:
    """Installs a combination, with what constraints.txt has of all else unless it does not go with
    these; why that cannot be done, if it cannot."""
    varied = {"torch": combination.torch, "ray": combination.ray, "mlflow": combination.mlflow}
    pins = [f"{name}=={version}" for name, version in varied.items()]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    # What is of one piece with these, such as mlflow-skinny and triton, follows them.
    follows = re.compile(r"(#|(torch|ray|triton|nvidia.*|cuda.*|mlflow(-skinny|-tracing)?)==)")
    others = [line for line in tested if not follows.match(line)]
    while True:
        (environment / "pins.txt").write_text("\n".join(pins + others))
        command = [environment / "bin" / "python", "-m", "pip", "install"]
        options = ["--disable-pip-version-check", "-c", environment / "pins.txt"]
        done = subprocess.run(
            [*command, *options, *_requirements()], capture_output=True, text=True
        )
        if done.returncode == 0:
            return None
        said = done.stdout + done.stderr
        conflicts = set(re.findall(r"requested \(constraint\) (\S+)==", said))
        kept = [line for line in others if line.partition("==")[0] not in conflicts]
        print(f"{combination}: without the pins of {sorted(conflicts)}", file=sys.stderr)
        if kept == others:
            errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
            return errors[0].removeprefix("ERROR: ") if errors else "pip failed"
        others = kept


def _install_slimfront(environment: Path) -> None:
    """Installs slimfront itself, whatever versions it asks for; a build leaves files in its
    tree."""
    source = environment / "source"
    source.mkdir()
    for name in ("search", "trainables", "slimfront"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)


def _requirements() -> list[str]:
    """What pyproject.toml asks for, with all extras, without its bounds on what varies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    wanted = [line for line in [*project["dependencies"], *extras] if "slimfront" not in line]
    return [re.sub(r"^(torch|ray\[.*\]|mlflow)[<>=].*", r"\1", line) for line in wanted]


def _tested(environment: Path) -> str:
    """pytest's last line, without the time that it took."""
    command = [environment / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parallel = ["-n", "2", "--dist", "loadfile"]
    done = subprocess.run(
        [*command, *parallel, *FAST],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line, file=sys.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout[-300:])
    return ", ".join(counts) or f"error: pytest ended with {done.returncode}"


if __name__ == "__main__":
    run(
        "versions",
        versions,
        ("--only", {"nargs": "*", "metavar": "NAME=VERSION", "help": "such as torch=2.13.0"}),
        ("--again", {"action": "store_true", "help": "forget what the table in the docs says"}),
    )
