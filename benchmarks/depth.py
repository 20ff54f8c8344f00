"""Whole layers and blocks that go while a network is trained, or afterwards: what they are chosen
by, and what is left.

A ResNet-20 and a small MobileNetV2 on CIFAR-10 pooled to 16×16 (scikit-learn's digits without the
folder of `--data`). Each network is trained once for a seed; every criterion then takes as many
blocks out of that same network; and, where layers can merge, as many of whatever can go: blocks,
or the activations of layers that become one then. All of these are trained for some epochs more. In
as many epochs altogether, others are trained in which layers close meanwhile (`depth.when:
training`), and the whole network, and one that has so few layers from the start.
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

from benchmarks.common import KEEP, Goal, Kept, Outcome, Spread, at_least, at_most, run, spread
from benchmarks.depth_rival import chosen, tables, without
from benchmarks.pictures import depth_before_and_after
from benchmarks.width import ROOT, made_splits, splits, trained_as_peers
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
from slimfront import Candidate, prune, train
from slimfront.trainables.compaction import Compaction, compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.whole_layers import whole_layers
from slimfront.trainables.depth import CRITERIA, OUTPUTS
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.measures.measure import measure

DEEP = {"ResNet-20": resnet20, "MobileNetV2": NETWORKS["MobileNetV2"]}
TAKEN = {"ResNet-20": 3, "MobileNetV2": 1}
"""How many blocks go: a third of those with a shortcut, and half of them."""
MERGED = {"MobileNetV2": (2, 3)}
"""How many go where blocks may become one convolution too."""
OR_MERGED = "{}, or merged: {}"
CLOSING = {
    "ResNet-20": (("cosine", 3), ("cka", 3), ("loss", 3), ("cosine", 4)),
    "MobileNetV2": (("entropy", 3), ("cka", 3), ("loss", 3), ("entropy", 2)),
}
"""By what, and how many, layers are chosen that close while training: of blocks alone where nothing
can merge. The first is compared with a network that is as shallow from the start."""
DRAWN = {"ResNet-20": ("cosine", 4), "MobileNetV2": ("entropy", 3)}
"""What closes in the networks of the picture."""
WHILE_TRAINING = "{}, while training: {}"
BY_TABLES = {"ResNet-20": 1.6, "MobileNetV2": 1.8}
"""The speed-up at batch 1 that the rival is asked for: that of what closes while training."""
LAYERMERGE = "as LayerMerge, by tables"
TABLE_STEPS = 25
"""How long the rival trains each network of its tables: half of an epoch."""
ONE_COSINE, FROM_SCRATCH = "dense, one cosine", "as shallow, from scratch"
FAST = 1.6
"""The speed-up at batch 1 from which on accuracy is compared with that of the whole network."""
DENSE, BY_CHANCE = "dense", "by chance"
FIRST_SEED, AFTERWARDS, LR_AFTERWARDS = 100, 3, 0.05
"""The networks are trained for so many epochs more, on a cosine from this learning rate, with their
batch norms, and are made compact then."""
EXAMPLES = 512
"""How many training examples the criteria see."""


@dataclass(frozen=True)
class Job:
    """A network of a seed: from which each criterion takes out as many blocks `afterwards`, in
    which layers close `while training`, or from which a rival takes them out `by tables`."""

    network: str
    seed: int
    epochs: int
    data: str
    """The file of the splits."""
    kind: str = "afterwards"

    @property
    def key(self) -> str:
        """What its results are kept by."""
        of = f"{self.network}; {self.seed}; {self.epochs}"
        return of if self.kind == "afterwards" else f"{of}; {self.kind}"


def trained(
    network: nn.Module,
    data: Splits,
    recipe: Recipe,
    seed: int,
    epochs: int,
    most: int | None = None,
) -> nn.Module:
    """Trains a network in place, for so many steps at the `most`."""
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    steps = steps_of(data, recipe, epochs)
    if most is not None:
        steps = min(steps, most)
    for step, inputs, labels in batches(data, recipe, seed, epochs):
        if step == steps:
            break
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


@dataclass(frozen=True)
class Way:
    """How layers of a network are chosen."""

    name: str
    criterion: str
    count: int
    stay: list[str]
    """The names of those that do not go."""


def ways(job: Job, network: nn.Module, inputs: torch.Tensor) -> list[Way]:
    """All that are compared on the network of a job."""
    count = TAKEN[job.network]
    branches, others = blocks_of(network, inputs)
    order = torch.randperm(len(branches), generator=torch.Generator().manual_seed(job.seed))
    by_chance = [branches[place] for place in order[:count]]
    stay = [*others, *(branch for branch in branches if branch not in by_chance)]
    found = [Way(name, name, count, others) for name in CRITERIA]
    found.append(Way(BY_CHANCE, OUTPUTS, count, stay))
    for merged in MERGED.get(job.network, ()):
        for name in CRITERIA:
            found.append(Way(OR_MERGED.format(name, merged), name, merged, []))
    return found


Measured = dict[str, dict[str, float]]
"""What was measured, by way."""


def fit(job: Job) -> Measured:
    """What becomes of the network in each way, and of the whole one, trained as long."""
    torch.set_num_threads(1)
    if job.kind == "while training":
        return fit_while_training(job)
    if job.kind == "by tables":
        return fit_by_tables(job)
    recipe = Recipe()
    data = normalised(torch.load(job.data))
    torch.manual_seed(job.seed)
    inputs = data["validation"][0][:256]
    network = DEEP[job.network](inputs.shape[1])
    trained(network, data, recipe, job.seed, job.epochs)
    dense = compact(network, inputs).network.eval()
    images, labels = (part[:EXAMPLES] for part in data["train"])
    pairs = list(zip(images.split(128), labels.split(128), strict=True))
    made: dict[str, nn.Module] = {DENSE: copy.deepcopy(network)}
    for way in ways(job, network, inputs[:3]):
        made[way.name] = prune(
            network,
            pairs,
            layers=way.count,
            criterion=way.criterion,
            loss=nn.functional.cross_entropy,
            exclude=way.stay,
            compaction=Compaction(enabled=False),
        ).network
    found: Measured = {}
    short = Recipe(lr=LR_AFTERWARDS)
    for name, smaller in made.items():
        at_once = accuracy(smaller, data["test"])
        trained(smaller, data, short, job.seed + 1, AFTERWARDS)
        small = compact(smaller, inputs).network.eval()
        found[name] = measured(small, dense, data) | {"at once": at_once}
    return found


def network_of(name: str, channels: int) -> nn.Module:
    """The model of a candidate."""
    return DEEP[name](channels)


def candidate(job: Job, channels: int, depth: dict[str, Any]) -> Candidate:
    """A training on one cosine, as long as the others with what follows."""
    model = {
        "factory": "benchmarks.depth:network_of",
        "args": {"name": job.network, "channels": channels},
    }
    epochs = job.epochs + AFTERWARDS
    return trained_as_peers(job.data, model, job.seed, epochs, {"depth": depth})


def fit_while_training(job: Job) -> Measured:
    """What becomes of networks whose layers close, of the whole one, and of one that has as few
    from the start."""
    data = normalised(splits(job.data))
    inputs = data["validation"][0][:256]
    channels = inputs.shape[1]
    plain = network_of(job.network, channels).eval()
    dense = compact(plain, inputs).network.eval()
    branches, others = blocks_of(plain, inputs[:3])
    exclude = [] if job.network in MERGED else others
    found: Measured = {}
    shallow: list[str] = []
    whole = train(candidate(job, channels, {})).compacted.network
    found[ONE_COSINE] = measured(whole, dense, data)
    for criterion, count in CLOSING[job.network]:
        depth = {"layers": count, "criterion": criterion, "exclude": exclude}
        made = train(candidate(job, channels, depth)).compacted
        found[WHILE_TRAINING.format(criterion, count)] = measured(made.network, dense, data)
        gone = [name for name, action, _ in made.report.steps if action == "pruned"]
        shallow = shallow or gone
    torch.manual_seed(job.seed)
    stay = [name for name in (*branches, *others) if name not in shallow]
    start = prune(
        network_of(job.network, channels).eval(),
        [inputs],
        layers=len(shallow),
        exclude=stay,
        compaction=Compaction(enabled=False),
    ).network
    for module in start.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    trained(start, data, Recipe(), job.seed, job.epochs + AFTERWARDS)
    small = compact(start, inputs).network.eval()
    found[FROM_SCRATCH] = measured(small, dense, data)
    return found


def fit_by_tables(job: Job) -> Measured:
    """What a rival makes of the trained network, as fast as ours or faster."""
    data = normalised(splits(job.data))
    inputs = data["validation"][0][:256]
    torch.manual_seed(job.seed)
    network = network_of(job.network, inputs.shape[1])
    trained(network, data, Recipe(), job.seed, job.epochs)
    dense = compact(network, inputs).network.eval()
    short = Recipe(lr=LR_AFTERWARDS)

    def judge(smaller: nn.Module) -> float:
        trained(smaller, data, short, job.seed + 1, epochs=1, most=TABLE_STEPS)
        return accuracy(smaller, data["validation"])

    entries = tables(network, inputs, judge)
    wanted = BY_TABLES[job.network]
    smaller = without(network, chosen(entries, wanted), inputs[:3])
    assert smaller is not None
    at_once = accuracy(smaller.eval(), data["test"])
    trained(smaller, data, short, job.seed + 1, AFTERWARDS)
    small = compact(smaller, inputs).network.eval()
    return {LAYERMERGE: measured(small, dense, data) | {"at once": at_once}}


def draw(networks: Sequence[str], file: str, epochs: int, path: Path) -> None:
    """One network of each kind before and after its layers have closed, trained for the picture."""
    inputs = normalised(splits(file))["validation"][0]
    pairs = {}
    for network in networks:
        job = Job(network, FIRST_SEED, epochs, file, "while training")
        whole = network_of(network, inputs.shape[1]).eval()
        criterion, count = DRAWN[network]
        depth = {"layers": count, "criterion": criterion}
        if network not in MERGED:
            depth["exclude"] = blocks_of(whole, inputs[:3])[1]
        made = train(candidate(job, inputs.shape[1], depth)).compacted
        pairs[network] = (whole, made.network)
    depth_before_and_after(pairs, inputs, path)


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
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "splits.pt"))
        torch.save(made_splits(Path(arguments.data, "cifar10")), file)
        work = [
            Job(network, seed, epochs, file, kind)
            for network in networks
            for kind in ("afterwards", "by tables", "while training")
            for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        ]
        if arguments.picture:
            draw(networks, file, epochs, arguments.picture)
        todo = [job for job in work if job.key not in kept.results]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for job, result in zip(todo, pool.map(fit, todo), strict=True):
                kept.put(job.key, result)
    for job in work:
        for method, values in kept.results[job.key].items():
            found.setdefault((job.network, method), []).append(values)
    rows = [_row(*cell, of) for cell, of in found.items()]
    return Outcome(seeds, rows, _goals(networks, found))


def _mean(results: Sequence[dict[str, float]], name: str) -> float:
    return sum(result[name] for result in results) / len(results)


def _row(network: str, method: str, results: list[dict[str, float]]) -> dict[str, Any]:
    def shown(name: str, scale: float = 1.0, digits: int = 1) -> Spread | str:
        if name not in results[0]:
            return ""
        return spread([scale * result[name] for result in results], digits)

    return {
        "network": network,
        "layers chosen by": method,
        "test accuracy, %": shown("accuracy", 100),
        "before the training afterwards, %": shown("at once", 100),
        "layers": shown("layers", digits=0),
        "parameters": shown("params", digits=0),
        "FLOPs, millions": shown("flops", 1e-6, 2),
        "speed-up at batch 1": shown("speedup 1", digits=2),
        "at batch 64": shown("speedup 64", digits=2),
    }


Found = dict[tuple[str, str], list[dict[str, float]]]


def _goals(networks: Sequence[str], found: Found) -> list[Goal]:
    goals = []
    for network in networks:
        best = _best(network, list(CRITERIA), found)
        above = _points(network, best, found) - _points(network, BY_CHANCE, found)
        goals.append(
            at_least(f"{network}: points of '{best}', the best criterion, above chance", above, 0.0)
        )
        goals += _closing_goals(network, found)
    return goals


def _closing_goals(network: str, found: Found) -> list[Goal]:
    """What closes while training, beside removal afterwards, beside a network that is shallow from
    the start, and beside the whole one."""
    closing = [WHILE_TRAINING.format(*way) for way in CLOSING[network]]
    goals = []
    first = closing[0]
    count = CLOSING[network][0][1]
    afterwards = OR_MERGED.format("loss", count) if network in MERGED else "loss"
    for other in (afterwards, FROM_SCRATCH):
        above = _points(network, first, found) - _points(network, other, found)
        goals.append(at_least(f"{network}: points of '{first}' above '{other}'", above, 0.0))
    goals += _beside_the_rival(network, found)
    fast = [way for way in closing if _mean(found[(network, way)], "speedup 1") >= FAST]
    if not fast:
        speed = max(_mean(found[(network, way)], "speedup 1") for way in closing)
        return [*goals, at_least(f"{network}: speed-up of the fastest", speed, FAST)]
    best = _best(network, fast, found)
    below = _points(network, ONE_COSINE, found) - _points(network, best, found)
    return [*goals, at_most(f"{network}: points of '{best}' below '{ONE_COSINE}'", below, 1.0)]


def _beside_the_rival(network: str, found: Found) -> list[Goal]:
    """What closes while training beside what tables choose: as good, and faster."""
    ours = WHILE_TRAINING.format(*DRAWN[network])
    where = f"{network}: '{ours}' beside '{LAYERMERGE}'"
    above = _points(network, ours, found) - _points(network, LAYERMERGE, found)
    mine = _mean(found[(network, ours)], "speedup 1")
    theirs = _mean(found[(network, LAYERMERGE)], "speedup 1")
    return [
        at_least(f"{where}: points above", above, 0.0),
        at_least(f"{where}: times as fast at batch 1", mine / theirs, 1.0),
    ]


def _best(network: str, methods: Sequence[str], found: Found) -> str:
    return max(methods, key=lambda method: _points(network, method, found))


def _points(network: str, method: str, found: Found) -> float:
    return 100 * _mean(found[(network, method)], "accuracy")


if __name__ == "__main__":
    run(
        "depth",
        depth,
        ("--seeds", {"type": int, "default": 5}),
        ("--data", {"default": str(ROOT.parent / "shared" / "data")}),
        ("--network", {"action": "append", "choices": list(DEEP), "help": "of these alone"}),
        KEEP,
        ("--picture", {"type": Path, "help": "where to put networks before and after, as PNG"}),
    )
