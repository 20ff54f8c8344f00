"""What a data set costs the processes of a node, decoded by each, shared, or read ahead from disk:
time, memory, epochs."""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from benchmarks.common import Outcome, at_least, at_most, run
from slimfront import Candidate
from slimfront.trainables.data.cache import FOLDER
from slimfront.trainables.training.loop import Training

WHERE: dict[str, bool | str] = {
    "in each process": True,
    "in the node's cache": "auto",
    "on disk, read ahead": False,
}
"""The options `in_memory` by what they mean."""

CLASSES = 10
BATCH = 128

PROCESS = """
import json, sys, time
from pathlib import Path
import torch
from slimfront import Candidate
from slimfront.trainables.data import load_once
torch.set_num_threads(1)
def memory():  # its share of what it has in memory: pages of several processes count in parts
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(rollup.partition("\\nPss:")[2].split()[0])
options = Candidate.model_validate({"data": json.loads(sys.argv[1])}).data
before = memory()
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
data = load_once(options, torch.device("cpu"))
batch = next(data.batches(torch.arange(len(data.train.targets)).split(128)))
data.prepare(batch.inputs)
print(time.perf_counter() - started, flush=True)
order = torch.arange(len(data.train.targets)).split(128)
sum(int(batch.inputs.sum()) for batch in data.batches(order))
print("read", flush=True)
sys.stdin.readline()
print(memory() - before, flush=True)
sys.stdin.readline()
"""


def write_images(folder: Path, count: int) -> None:
    """`train.parquet` of random 32×32 RGB images as PNGs, blurred so that they compress as
    photographs do."""
    draw = np.random.default_rng(0)
    encoded = []
    for coarse in draw.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    labels = datasets.ClassLabel(names=[str(number) for number in range(CLASSES)])
    rows = {"image": encoded, "label": [row % CLASSES for row in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))


def options(folder: Path, where: str) -> dict[str, Any]:
    """The section `data` of a config."""
    return {"name": "huggingface", "path": str(folder), "in_memory": WHERE[where]}


def start_processes(folder: Path, where: str, processes: int) -> tuple[float, float]:
    """Lets processes ask for the data at once: seconds until the last has its first batch, and
    bytes that all take together."""
    command = [sys.executable, "-c", PROCESS, json.dumps(options(folder, where))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]

    def say(word: str) -> list[str]:
        """Tells all of them to go on, once they are ready; and what they answer."""
        for process in running:
            assert process.stdin is not None
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
        return hear()

    def hear() -> list[str]:
        return [str(process.stdout and process.stdout.readline()) for process in running]

    try:
        hear()
        seconds = max(map(float, say("load")))
        hear()
        return seconds, sum(map(float, say("measure")))
    finally:
        for process in running:
            process.communicate("\n")


def epoch_seconds(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch of a small network with augmentation; in every round one of each, and
    the first does not count."""
    trainings = {}
    for where in WHERE:
        data = options(folder, where) | {"augment": {"crop": 2, "flip": True}}
        model, training = (
            {"name": "mlp", "depth": 1, "width": 32},
            {"epochs": rounds + 1, "batch_size": BATCH, "seed": 0},
        )
        trainings[where] = Training(
            Candidate.model_validate({"data": data, "model": model, "training": training})
        )
    seconds: dict[str, list[float]] = {where: [] for where in WHERE}
    losses: dict[str, list[float]] = {where: [] for where in WHERE}
    for number in range(rounds + 1):
        for where, training in trainings.items():
            started = time.perf_counter()
            losses[where].append(float(training.run_epoch()["train_loss"]))
            if number:
                seconds[where].append(time.perf_counter() - started)
    assert len({tuple(found) for found in losses.values()}) == 1, (
        "the same training came out differently"
    )
    return seconds


def data(arguments: argparse.Namespace) -> Outcome:
    """Time to the first batch, memory and epochs per second, by where the examples are."""
    count, processes, rounds = (2_000, 2, 5) if arguments.quick else (30_000, 4, 11)
    rows, first, again, memory = [], {}, {}, {}
    torch.set_num_threads(1)  # as trials on one core each
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        folder, cache = Path(directory, "images"), Path(directory, "cache")
        os.environ |= {FOLDER: str(cache), "HF_DATASETS_CACHE": str(Path(directory, "arrow"))}
        datasets.config.HF_DATASETS_CACHE = Path(directory, "arrow")
        folder.mkdir()
        write_images(folder, count)
        # Its own copy, made only once.
        datasets.load_dataset("parquet", data_files={"train": str(folder / "train.parquet")})
        for where in WHERE:
            shutil.rmtree(cache, ignore_errors=True)
            first[where], _ = start_processes(folder, where, processes)
            again[where], memory[where] = start_processes(folder, where, processes)
        seconds = epoch_seconds(folder, rounds)
    for where, option in WHERE.items():
        rows.append(
            {
                "examples": where,
                "`in_memory`": str(option).lower(),
                f"s to the first batch, {processes} processes": f"{first[where]:.2f}",
                "s, another time": f"{again[where]:.3f}",
                f"MB of {processes} processes": f"{memory[where] / 1e6:.0f}",
                "epochs per s": f"{1 / statistics.median(seconds[where]):.2f}",
            }
        )
    each, shared, disk = WHERE

    def slower(where: str) -> float:
        """The median of the ratios of the rounds to the epochs in memory."""
        return statistics.median(a / b for a, b in zip(seconds[where], seconds[each], strict=True))

    goals = [
        at_least(
            "decoding in each process / asking the filled cache, time",
            again[each] / again[shared],
            10,
        ),
        at_most("memory with the node's cache / without", memory[shared] / memory[each], 0.5),
        at_most("time of an epoch from the node's cache / from memory", slower(shared), 1.1),
        at_most("time of an epoch from disk, read ahead / from memory", slower(disk), 1.1),
    ]
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("data", data)
