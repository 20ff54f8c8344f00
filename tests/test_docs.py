"""The Python that the docs tell people to run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": r"\d{4} \(\('1', 'units removed', '\d+ units",
    "docs/config.md": r"(\{'epoch': \d, .*\n){2}\{'val_accuracy': 0\.\d+, 'params': 17290",
    "docs/python.md": r"[1-9]\d* \d{3,4}\n",
    "docs/shipping.md": r"970 to 490\n\S+e-\d\d \(\('depthwise', 'units removed', '8 channels",
    "docs/performance.md": r"(0 0\.\d+\n1 0\.\d+\n2 0\.\d+\n){3}",
}
"""By page, what its programs print: a regular expression from the first line on."""


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert re.match(PAGES[page], capsys.readouterr().out)
