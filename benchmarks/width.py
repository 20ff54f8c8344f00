"""Whole channels: ours beside OTO's HESSO, ModelOpt's FastNAS and Torch-Pruning's recipes, at equal
epochs.

A ResNet-8 and a small MobileNetV2 on CIFAR-10 pooled to 16×16 (scikit-learn's digits without the
folder of `--data`), at two sizes. OTO and ModelOpt run in environments of their own, which `make
peers` sets up; one that is not there is left out. Batch norms are folded in all networks before
they are counted.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from sklearn.datasets import load_digits
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance

from benchmarks.common import KEEP, Goal, Kept, Outcome, at_least, at_most, run, spread
from benchmarks.pretrained import read_images
from benchmarks.width_networks import (
    NETWORKS,
    Recipe,
    Splits,
    accuracy,
    batches,
    cosine,
    normalised,
    steps_of,
)
from slimfront import Candidate, train
from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.measures.measure import measure

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 6400, "validation": 1600, "test": 10_000}
FIRST_SEED = 100
DENSE, OURS, OURS_FLOPS, BEFORE = (
    "dense",
    "ours, of: params",
    "ours, of: flops",
    "ours, version 0.1",
)
TAYLOR, NORM = "Torch-Pruning, Taylor", "Torch-Pruning, group norm"
HESSO, FASTNAS = "OTO, HESSO", "ModelOpt, FastNAS"
PEERS = {HESSO: ("hesso.py", ".venv-oto"), FASTNAS: ("fastnas.py", ".venv-modelopt")}
"""The program of a peer, and the environment that it runs in."""

LARGE, SMALL = "about 40 %", "about 10 %"
SHARES: dict[str, dict[str, float]] = {
    OURS: {LARGE: 0.68, SMALL: 0.89},
    OURS_FLOPS: {LARGE: 0.6, SMALL: 0.86},
    BEFORE: {LARGE: 0.4, SMALL: 0.7},
    TAYLOR: {LARGE: 0.4, SMALL: 0.7},
    NORM: {LARGE: 0.4, SMALL: 0.7},
    HESSO: {LARGE: 0.4, SMALL: 0.7},
    FASTNAS: {LARGE: 0.4, SMALL: 0.12},
}
"""What each is told for a size: the share that goes, and FastNAS the share of the parameters that
stays."""
ITERATIONS = 5
"""Torch-Pruning removes channels in so many steps, between `START` and `END` of the training."""
START, END = 0.1, 0.7


@dataclass(frozen=True)
class Job:
    """One training."""

    network: str
    method: str
    size: str
    seed: int
    epochs: int
    data: str
    """The file of the splits."""

    @property
    def share(self) -> float:
        """What the method is told."""
        return SHARES[self.method][self.size]


@dataclass(frozen=True)
class Result:
    """A compact network's accuracy on the test split, sizes, and speed-ups by batch size."""

    accuracy: float
    measures: dict[str, float]
    speedups: dict[int, float]


def made_splits(folder: Path) -> Splits:
    """The images and labels, as they come."""
    if not (folder / "train.parquet").is_file():
        inputs, labels = load_digits(return_X_y=True)
        images = torch.tensor(inputs).float().view(-1, 1, 8, 8)
        images = nn.functional.interpolate(images, scale_factor=2)
        ends = {"train": (0, 1200), "validation": (1200, 1400), "test": (1400, len(images))}
        targets = torch.tensor(labels)
        return {name: (images[a:b], targets[a:b]) for name, (a, b) in ends.items()}
    learned = COUNTS["train"] + COUNTS["validation"]
    inputs, targets = read_images(folder / "train.parquet", learned, 2)
    cut = COUNTS["train"]
    return {
        "train": (inputs[:cut], targets[:cut]),
        "validation": (inputs[cut:], targets[cut:]),
        "test": read_images(folder / "test.parquet", COUNTS["test"], 2),
    }


@cache
def splits(file: str) -> Splits:
    """The data set of a candidate."""
    loaded: Splits = torch.load(file)
    return loaded


def network_of(name: str, channels: int) -> nn.Module:
    """The model of a candidate."""
    return NETWORKS[name](channels)


def candidate(job: Job, channels: int) -> Candidate:
    """What ours trains."""
    sparsifiers: dict[str, dict[str, Any]] = {
        OURS: {"name": "channels", "of": "params"},
        OURS_FLOPS: {"name": "channels", "of": "flops"},
        BEFORE: {"name": "channels", "of": "channels", "importance": "taylor"},
    }
    parts: dict[str, Any] = {}
    if job.method != DENSE:
        parts["sparsifier"] = sparsifiers[job.method] | {"sparsity": job.share}
    model = {
        "factory": "benchmarks.width:network_of",
        "args": {"name": job.network, "channels": channels},
    }
    return trained_as_peers(job.data, model, job.seed, job.epochs, parts)


def trained_as_peers(
    data: str, model: dict[str, Any], seed: int, epochs: int, parts: dict[str, Any]
) -> Candidate:
    """A candidate with the recipe of all methods, and `parts` of its own; `data` is the file of the
    splits."""
    recipe = Recipe()
    tree = {
        "data": {
            "name": "factory",
            "factory": "benchmarks.width:splits",
            "args": {"file": data},
            "normalise": "global",
            "augment": {"crop": recipe.crop, "flip": True},
        },
        "model": model,
        "training": {
            "epochs": epochs,
            "batch_size": recipe.batch_size,
            "optimizer": "sgd",
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "lr": recipe.lr,
            "schedule": "cosine",
            "seed": seed,
            "report_every": epochs,
        },
        "one_shot": {"steps": 0},
    }
    return Candidate.model_validate(tree | parts)


def torch_prunings(job: Job, data: Splits) -> nn.Module:
    """One training on a cosine, in which channels of all layers go in a few steps."""
    recipe = Recipe()
    torch.manual_seed(job.seed)
    example = data["train"][0][:2]
    network = NETWORKS[job.network](example.shape[1])
    taylor = job.method == TAYLOR
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=GroupTaylorImportance() if taylor else GroupMagnitudeImportance(),
        pruning_ratio=job.share,
        max_pruning_ratio=0.95,
        global_pruning=True,
        iterative_steps=ITERATIONS,
        ignored_layers=[list(network.modules())[-1]],
    )
    steps = steps_of(data, recipe, job.epochs)
    span = (END - START) * steps / (ITERATIONS - 1)
    due = {round(START * steps + span * number) for number in range(ITERATIONS)}
    optimizer = _sgd(network, recipe)
    for step, inputs, labels in batches(data, recipe, job.seed, job.epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine(recipe, step, steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
        if step in due:
            pruner.step()  # by the gradients of this batch
            optimizer = _sgd(network, recipe)
    return network.eval()


def _sgd(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def of_peer(job: Job) -> nn.Module:
    """The network that a peer makes in its own environment."""
    program, environment = PEERS[job.method]
    told = json.dumps(asdict(job) | {"share": job.share})
    python = ROOT / environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.pt")
        command = [str(python), str(ROOT / "benchmarks" / "peers" / program), told, job.data]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{job.method}: {done.stderr.strip()[-2000:]}")
        network: nn.Module = torch.load(file, weights_only=False)
    return network.eval()


def fit(job: Job) -> Result:
    """Trains, folds, and measures on the test split and beside the dense network."""
    torch.set_num_threads(1)
    data = normalised(splits(job.data))
    channels = data["train"][0].shape[1]
    inputs = data["validation"][0][:256]
    if job.method in (TAYLOR, NORM):
        network = torch_prunings(job, data)
    elif job.method in PEERS:
        network = of_peer(job)
    else:
        network = train(candidate(job, channels)).compacted.network
    folded = compact(network, inputs).network.eval()
    dense = compact(NETWORKS[job.network](channels).eval(), inputs).network.eval()
    speedups = {}
    for size in (1, 64):
        timed = time_networks([dense, folded], inputs, Latency(batch_size=size))
        speedups[size] = timed[1].speedup
    return Result(accuracy(folded, data["test"]), measure(folded, inputs), speedups)


def width(arguments: argparse.Namespace) -> Outcome:
    """Test accuracy, sizes and speed of each method at two sizes, and ours beside the best peer."""
    seeds, epochs, networks = arguments.seeds, Recipe().epochs, arguments.network or list(NETWORKS)
    if arguments.quick:
        seeds, epochs, networks = 1, 2, networks[:1]
    there = [name for name, (_, folder) in PEERS.items() if (ROOT / folder).is_dir()]
    methods = [method for method in SHARES if method not in PEERS or method in there]
    for missing in PEERS.keys() - set(there):
        print(f"{missing} is left out: `make peers` sets it up", file=sys.stderr)
    cells = []
    for network in networks:
        cells.append((network, DENSE, ""))
        cells += [(network, method, size) for method in methods for size in (LARGE, SMALL)]
    used = range(FIRST_SEED, FIRST_SEED + seeds)
    found: dict[tuple[str, str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "splits.pt"))
        torch.save(made_splits(Path(arguments.data, "cifar10")), file)
        work = [Job(*cell, seed, epochs, file) for cell in cells for seed in used]
        kept = Kept(arguments.keep)
        todo = [job for job in work if _key(job) not in kept.results]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for job, result in zip(todo, pool.map(fit, todo), strict=True):
                kept.put(_key(job), asdict(result))
        for job in work:
            cell = (job.network, job.method, job.size)
            found.setdefault(cell, []).append(_result(kept.results[_key(job)]))
    goals = [goal for network in networks for goal in _goals(network, found)]
    return Outcome(seeds, [_row(cell, of) for cell, of in found.items()], goals)


def _key(job: Job) -> str:
    """What a job is kept as."""
    return f"{job.network}; {job.method}; {job.size}; {job.seed}; {job.epochs}"


def _result(plain: dict[str, Any]) -> Result:
    """A result that was kept as plain data."""
    speedups = {int(size): value for size, value in plain["speedups"].items()}
    return Result(plain["accuracy"], plain["measures"], speedups)


def _goals(network: str, found: dict[tuple[str, str, str], list[Result]]) -> list[Goal]:
    """At both sizes beside the peer of the highest mean accuracy."""
    goals = []
    peers = (TAYLOR, NORM, *PEERS)
    in_errors = []
    for size in (LARGE, SMALL):
        theirs = [of for (n, m, s), of in found.items() if (n, s) == (network, size) and m in peers]
        best = max(theirs, key=_accuracy)
        ours = found[(network, OURS, size)]
        where = f"{network}, {size} of the parameters"
        difference = _accuracy(ours) - _accuracy(best)
        points = 100 * difference
        goals.append(at_least(f"{where}: points above the best peer", points, 0.0))
        params = _mean(ours, "params") / _mean(best, "params")
        goals.append(at_most(f"{where}: parameters, ours over the best peer's", params, 1.0))
        able = []
        for method in (OURS, OURS_FLOPS):
            mine = found[(network, method, size)]
            error = _standard_error(mine, best)
            if _accuracy(mine) >= _accuracy(best) - error:
                able.append(_mean(mine, "flops"))
        flops = min(able, default=math.inf) / _mean(best, "flops")
        name = f"{where}: FLOPs at equal accuracy, to one standard error, ours over the best peer's"
        goals.append(at_most(name, flops, 1.0))
        error = _standard_error(ours, best)
        if error:
            in_errors.append(difference / error)
    if in_errors:
        name = f"{network}: standard errors above the best peer, at one of the sizes"
        goals.append(at_least(name, max(in_errors), 1.0))
    return goals


def _accuracy(results: list[Result]) -> float:
    return statistics.mean(result.accuracy for result in results)


def _mean(results: list[Result], name: str) -> float:
    return statistics.mean(result.measures[name] for result in results)


def _standard_error(*several: list[Result]) -> float:
    """Of the difference of two means; 0 with one seed."""
    if len(several[0]) < 2:
        return 0.0
    squares = []
    for results in several:
        variance = statistics.variance(result.accuracy for result in results)
        squares.append(variance / len(results))
    return math.sqrt(sum(squares))


def _row(cell: tuple[str, str, str], results: list[Result]) -> dict[str, Any]:
    network, method, size = cell
    return {
        "network": network,
        "method": method,
        "size": size,
        "test accuracy, %": spread([100 * r.accuracy for r in results], 1),
        "parameters": spread([r.measures["params"] for r in results], 0),
        "FLOPs": spread([r.measures["flops"] for r in results], 0),
        "speed-up, batch 1": spread([r.speedups[1] for r in results], 2),
        "speed-up, batch 64": spread([r.speedups[64] for r in results], 2),
    }


if __name__ == "__main__":
    run(
        "width",
        width,
        ("--seeds", {"type": int, "default": 5}),
        ("--data", {"default": str(ROOT.parent / "shared" / "data")}),
        ("--network", {"action": "append", "choices": list(NETWORKS), "help": "of these alone"}),
        KEEP,
    )
