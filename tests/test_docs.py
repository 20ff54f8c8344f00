"""The Python that the docs tell people to run."""

import ast
import re
from pathlib import Path

import pytest

import slimfront

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": r"\d{4} \(\('1', 'units removed', '\d+ units",
    "docs/own-training.md": (
        r"(\d+ of \d+ parameters), accuracy 0\.9\d\n\1, accuracy 0\.9\d\n"
        r"(.*\n)*Lightning: [23]\d{3} parameters\n(.*\n)*Transformers: \d+ of \d+ parameters\n"
    ),
    "docs/python.md": r"[1-9]\d* \d{3,4}\n# trial-00\d@[\s\S]*\n\('0', 'pruned', '",
    "docs/shipping.md": r"970 to 474\n\S+e-\d\d \(\('stem', 'units removed', '8 units",
}
"""By page, what its programs print: a regular expression from the first line on."""


def programs(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = programs(ROOT / page)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert re.match(PAGES[page], capsys.readouterr().out)


def internal(program: str) -> list[str]:
    """What a program imports of slimfront beside what users may rely on."""
    found = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("slimfront.")]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("slimfront."):
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "slimfront":
            found += [a.name for a in node.names if a.name not in slimfront.__all__]
    return found


def test_docs_import_nothing_that_is_internal() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    found = {page.name: [name for p in programs(page) for name in internal(p)] for page in pages}
    assert sum(bool(programs(page)) for page in pages) >= len(PAGES)
    assert not {page: names for page, names in found.items() if names}
    assert internal("from slimfront.trainables.packs import Pack") == ["slimfront.trainables.packs"]
    assert internal("from slimfront import Candidate, Pack") == ["Pack"]
