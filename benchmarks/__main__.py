"""`make bench`: runs every benchmark and writes its tables into the docs, so that no figure is typed by hand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BENCHMARKS = {"main_job": ["--picture", "docs/images/front.png"]}
"""The benchmarks by name, with their options; their tables go between `<!-- NAME -->` and `<!-- /NAME -->`."""


def main() -> None:
    """Runs all, or those named on the command line."""
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *BENCHMARKS[name]]
        table = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        print(table, flush=True)
        for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
            text = page.read_text()
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            page.write_text(pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text))


if __name__ == "__main__":
    main()
