"""Whole layers and blocks taken out of a trained network: what they are chosen by, and what is left
after a short training.

A ResNet-20 and a small MobileNetV2 on CIFAR-10 pooled to 16×16 (scikit-learn's digits without the
folder of `--data`). Each network is trained once for a seed; every criterion then takes as many
blocks out of that same network.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import KEEP, Goal, Kept, Outcome, Spread, at_least, run, spread
from benchmarks.width import ROOT, made_splits
from benchmarks.width_networks import (
    NETWORKS,
    Recipe,
    Splits,
    accuracy,
    batches,
    cosine,
    normalised,
    resnet20,
    steps_of,
)
from slimfront import prune
from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import whole_layers
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.post_training.depth import CRITERIA, OUTPUTS

DEEP = {"ResNet-20": resnet20, "MobileNetV2": NETWORKS["MobileNetV2"]}
TAKEN = {"ResNet-20": 3, "MobileNetV2": 1}
"""How many blocks go: a third of those with a shortcut, and half of them."""
DENSE, BY_CHANCE = "dense", "by chance"
FIRST_SEED, AFTERWARDS, LR_AFTERWARDS = 100, 3, 0.005
"""The networks are trained for so many epochs more, on a cosine from this learning rate. Their
batch norms are folded, so that they bear no large one."""
EXAMPLES = 512
"""How many training examples the criteria see."""


@dataclass(frozen=True)
class Job:
    """A network of a seed, from which each criterion takes out as many blocks."""

    network: str
    seed: int
    epochs: int
    data: str
    """The file of the splits."""


def trained(network: nn.Module, data: Splits, recipe: Recipe, seed: int, epochs: int) -> nn.Module:
    """Trains a network in place."""
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    steps = steps_of(data, recipe, epochs)
    for step, inputs, labels in batches(data, recipe, seed, epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine(recipe, step, steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network.eval()


def blocks_of(network: nn.Module, inputs: torch.Tensor) -> tuple[list[str], list[str]]:
    """The names of the residual branches that can go, and of all else that can."""
    found = whole_layers(traced_in_both_modes(network, inputs), inputs)
    branches = [layer.name for layer in found if layer.what.startswith("the residual branch")]
    return branches, [layer.name for layer in found if layer.name not in branches]


def fit(job: Job) -> dict[str, dict[str, float]]:
    """What becomes of the network by each criterion, and of the whole one, trained as long."""
    torch.set_num_threads(1)
    recipe = Recipe()
    data = normalised(torch.load(job.data))
    torch.manual_seed(job.seed)
    inputs = data["validation"][0][:256]
    network = DEEP[job.network](inputs.shape[1])
    trained(network, data, recipe, job.seed, job.epochs)
    dense = compact(network, inputs).network.eval()
    found: dict[str, dict[str, float]] = {}
    branches, others = blocks_of(network, inputs[:3])
    order = torch.randperm(len(branches), generator=torch.Generator().manual_seed(job.seed))
    by_chance = [branches[place] for place in order[: TAKEN[job.network]]]
    images, labels = (part[:EXAMPLES] for part in data["train"])
    pairs = list(zip(images.split(128), labels.split(128), strict=True))
    short = Recipe(lr=LR_AFTERWARDS)
    for name in (DENSE, *CRITERIA, BY_CHANCE):
        stay = list(others)
        if name == BY_CHANCE:
            stay += [branch for branch in branches if branch not in by_chance]
        if name == DENSE:
            made: nn.Module = copy.deepcopy(dense)
        else:
            made = prune(
                network,
                pairs,
                layers=TAKEN[job.network],
                criterion=OUTPUTS if name == BY_CHANCE else name,
                loss=nn.functional.cross_entropy,
                exclude=stay,
            ).network
        at_once = accuracy(made, data["test"])
        trained(made, data, short, job.seed + 1, AFTERWARDS)
        found[name] = measured(made, dense, data) | {"at once": at_once}
    return found


def measured(network: nn.Module, dense: nn.Module, data: Splits) -> dict[str, float]:
    """Accuracy on the test split, sizes, and speed-ups over the dense network."""
    inputs = data["validation"][0][:256]
    found = dict(measure(network, inputs)) | {"accuracy": accuracy(network, data["test"])}
    for size in (1, 64):
        timed = time_networks([dense, network], inputs, Latency(batch_size=size))
        found[f"speedup {size}"] = timed[1].speedup
    return found


def depth(arguments: argparse.Namespace) -> Outcome:
    """Test accuracy of networks without some of their blocks, by what these were chosen by."""
    seeds, epochs = arguments.seeds, Recipe().epochs
    networks = arguments.network or list(DEEP)
    if arguments.quick:
        seeds, epochs, networks = 1, 1, networks[:1]
    kept = Kept(arguments.keep)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "splits.pt"))
        torch.save(made_splits(Path(arguments.data, "cifar10")), file)
        work = [
            Job(network, seed, epochs, file)
            for network in networks
            for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        ]
        todo = [job for job in work if _key(job) not in kept.results]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for job, result in zip(todo, pool.map(fit, todo), strict=True):
                kept.put(_key(job), result)
    for job in work:
        for method, values in kept.results[_key(job)].items():
            found.setdefault((job.network, method), []).append(values)
    rows = [_row(*cell, of) for cell, of in found.items()]
    return Outcome(seeds, rows, [_goal(network, found) for network in networks])


def _key(job: Job) -> str:
    return f"{job.network}; {job.seed}; {job.epochs}"


def _mean(results: Sequence[dict[str, float]], name: str) -> float:
    return sum(result[name] for result in results) / len(results)


def _row(network: str, method: str, results: list[dict[str, float]]) -> dict[str, Any]:
    def shown(name: str, scale: float = 1.0, digits: int = 1) -> Spread:
        return spread([scale * result[name] for result in results], digits)

    return {
        "network": network,
        "blocks chosen by": method,
        "test accuracy, %": shown("accuracy", 100),
        "before the training afterwards, %": shown("at once", 100),
        "layers": shown("layers", digits=0),
        "parameters": shown("params", digits=0),
        "FLOPs, millions": shown("flops", 1e-6, 2),
        "speed-up at batch 1": shown("speedup 1", digits=2),
        "at batch 64": shown("speedup 64", digits=2),
    }


def _goal(network: str, found: dict[tuple[str, str], list[dict[str, float]]]) -> Goal:
    criteria = {method: _mean(found[(network, method)], "accuracy") for method in CRITERIA}
    best = max(criteria, key=lambda method: criteria[method])
    chance = _mean(found[(network, BY_CHANCE)], "accuracy")
    name = f"{network}: points of '{best}', the best criterion, above chance"
    return at_least(name, 100 * (criteria[best] - chance), 0.0)


if __name__ == "__main__":
    run(
        "depth",
        depth,
        ("--seeds", {"type": int, "default": 5}),
        ("--data", {"default": str(ROOT.parent / "shared" / "data")}),
        ("--network", {"action": "append", "choices": list(DEEP), "help": "of these alone"}),
        KEEP,
    )
