"""`make bench`: runs every benchmark and writes its tables into the docs, so that no figure is
typed by hand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BENCHMARKS = {
    "main_job": ["main_job", "--picture", "docs/images/front.png"],
    "layer_sparsity_digits": ["layer_sparsity", "--picture", "docs/images/layers.png"],
    "layer_sparsity_mnist": ["layer_sparsity", "--data", "mnist"],
    "block_sparsity": ["block_sparsity"],
    "block_cost": ["block_cost"],
    "penalty_steps": ["penalty_steps"],
    "strength_path": ["strength_path"],
    "packs": ["packs"],
    "compiled": ["compiled"],
    "mapping": ["mapping"],
    "packed_search": ["packed_search"],
    "cka": ["cka"],
    "sparse_training": ["sparse_training"],
    "compact": ["compact"],
    "width": ["width", "--keep", "runs/width.jsonl"],
    "depth": ["depth", "--keep", "runs/depth.jsonl", "--picture", "docs/images/depth.png"],
    "compaction_cost": ["compaction_cost"],
    "post_training": ["post_training"],
    "pretrained": ["pretrained"],
    "repetitions": ["repetitions"],
    "search_quality": ["search_quality", "--keep", "runs/search_quality.jsonl"],
    "search_moasha": ["search_quality", "--only", "ours", "--keep", "runs/search_moasha.jsonl"],
    "test_problems": ["test_problems"],
    "scale": ["scale"],
    "cluster": ["cluster"],
    "data": ["data"],
    "tracking": ["tracking"],
    "throughput": ["throughput", "--only", "MLP"],
    "throughput_convolutional": ["throughput", "--only", "2,000"],
    "throughput_profile": ["throughput", "--profile"],
    "throughput_profile_packs": ["throughput", "--profile", "16"],
    "chaos": ["chaos"],
    "fuzz": ["fuzz"],
    "adversarial": ["adversarial"],
    "house": ["house"],
}
"""What to run, by the name of the table: the benchmark and its options. It goes between
`<!-- NAME -->` and `<!-- /NAME -->`."""

ON_A_GPU = {
    "gpu": ["gpu"],
    "gpu_latency": ["gpu_latency"],
    "gpu_search": ["gpu_search"],
    "fidelity": ["fidelity", "--scale", "paper", "--table"],
}
"""The same, of what runs only where it is named: `python -m benchmarks gpu`.

`python -m benchmarks gpu=FILE` takes what a run on another machine printed.
"""


BY_NAME = {
    "versions": ["versions"],
    "zoo": ["zoo", "--keep", "runs/zoo.jsonl"],
    "search_images": ["search_images", "--keep", "runs/search_images.jsonl"],
}
"""The same, of what takes hours, or needs data or an environment: `make versions`, `make zoo`."""


def main() -> None:
    """Runs all, or those named on the command line."""
    for argument in sys.argv[1:] or BENCHMARKS:
        name, _, file = argument.partition("=")
        print(f"== {name}", flush=True)
        benchmark, *options = (BENCHMARKS | ON_A_GPU | BY_NAME)[name]
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *options]
        if file:
            printed = re.sub(r"^\{.*", "", Path(file).read_text(), flags=re.MULTILINE)
        else:
            printed = subprocess.run(
                command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        table = re.sub(
            r"\A.*?(?=^\d+ seeds?;)", "", printed, flags=re.DOTALL | re.MULTILINE
        ).strip()  # Ray may print before it
        print(table, flush=True)
        for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
            text = page.read_text()
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            page.write_text(pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text))


if __name__ == "__main__":
    main()
