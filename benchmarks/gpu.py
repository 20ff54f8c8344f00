"""Training on a GPU: a residual network on images of CIFAR-10's shape, one candidate, packs and
processes against plain loops.

Each is compared with the plain loop that has the same switches, and step times with the least that
the GPU could take: all operations at the rate of a large matrix product, and all bytes at the rate
of a large copy, both measured here.

Not among those of `make bench`, which runs on machines without a GPU; there, `--quick` shows on a
small network that it works. On one with a GPU, `python -m benchmarks gpu` writes the table into the
docs.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Outcome, at_least, at_most, run
from benchmarks.penalty_steps import PENALTY_OPTIONS
from slimfront import Candidate
from slimfront.trainables.data import Dataset
from slimfront.trainables.measures.latency import seconds_of
from slimfront.trainables.packs import Pack
from slimfront.trainables.training.loop import Training

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
GOAL, GOAL_SIZE = 5.0, 16
EPOCHS = 10**6
"""No training ends here."""
WAIT_S = 600
"""The longest wait for the others of several processes."""

BF16 = {"precision": "bf16"}
BF16_LAST = BF16 | {"channels_last": True}
COMPILED = {"compile": True}
NO_GRAPHS = {"cuda_graphs": False}
AUGMENT = {"crop": 4, "flip": True}


@dataclass(frozen=True)
class Scale:
    """How much is trained: images (of which a fifth validate) per epoch, in batches, and timed
    epochs of each rival."""

    width: int
    batch: int
    images: int
    rounds: int
    packs: tuple[int, ...]
    processes: tuple[int, ...]

    @property
    def real(self) -> bool:
        """Whether the images are those of CIFAR-10, where they are at hand."""
        return self.images > 1000 and CIFAR.exists()


FULL = Scale(16, 128, 20_000, 3, (2, 4, 8, 16, 32, 64), (2, 4, 8))
LESS = Scale(16, 128, 10_000, 3, (4, 16), ())
TINY = Scale(8, 16, 80, 1, (2,), (2,))
"""Without a GPU: that it runs, and nothing about speed."""


def images(count: int) -> tuple[Tensor, Tensor]:
    """Random images of CIFAR-10's shape, uint8, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), labels


def tree(
    scale: Scale,
    number: int = 0,
    training: dict[str, Any] | None = None,
    augment: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """The config of candidate `number`, which differs from the others in its seed and learning
    rate."""
    if scale.real:
        data: dict[str, Any] = {"name": "huggingface", "path": str(CIFAR), "limit": scale.images}
    else:
        data = {
            "name": "factory",
            "factory": "benchmarks.gpu:images",
            "args": {"count": scale.images},
            "test": 0.2,
        }
    numbers = {
        "epochs": EPOCHS,
        "batch_size": scale.batch,
        "seed": number,
        "lr": 0.05 / (1 + number % 4),
    }
    sgd = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
    return {
        "data": data | ({"augment": augment} if augment else {}),
        "model": {"name": "resnet20", "width": scale.width},
        "training": numbers | sgd | (training or {}),
        **more,
    }


def training(device: torch.device, *options: Any, **more: Any) -> Training:
    """The training of `tree(*options, **more)`, whose data must be on the device."""
    made = Training(Candidate.model_validate(tree(*options, **more)), device)
    assert made.data.train.inputs.device.type == made.data.device.type == device.type
    return made


class Plain:
    """The loop that a user would write: torch alone, images on the device, and no data loader."""

    candidates = 1

    def __init__(
        self,
        like: Training,
        bf16: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """It trains what `like` trains."""
        data, self.batch, self.bf16 = like.data, like.options.batch_size, bf16
        layout = torch.channels_last if channels_last else torch.contiguous_format
        inputs = (
            data.prepare(split.inputs).to(memory_format=layout)
            for split in (data.train, data.validation)
        )
        self.inputs, self.held_inputs = inputs
        self.targets, self.held_labels = data.train.targets, data.validation.targets
        self.model = like.candidate.model.build(data.input_shape, data.head).to(data.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.network = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
        )

    def epoch(self) -> None:
        """Trains one, and takes the validation accuracy."""
        self.model.train()
        device = self.inputs.device
        for batch in torch.randperm(len(self.targets), device=device).split(self.batch):
            network = self.network if len(batch) == self.batch else self.model
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                outputs = network(self.inputs[batch])
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(outputs.float(), self.targets[batch]).backward()
            self.optimizer.step()
        self.model.eval()
        with torch.no_grad():
            outputs = torch.cat([self.model(some) for some in self.held_inputs.split(4096)])
            float((outputs.argmax(1) == self.held_labels).float().mean())


class Together:
    """One candidate, or several in a pack."""

    def __init__(self, trainings: list[Training]) -> None:
        self.trainings, self.candidates = trainings, len(trainings)
        self.pack = Pack(trainings, trainings[0].device) if len(trainings) > 1 else None

    def epoch(self) -> None:
        """Trains one of each."""
        for result in (
            self.pack.run_epoch().values() if self.pack else [self.trainings[0].run_epoch()]
        ):
            if isinstance(result, Exception):
                raise result


Rival = Plain | Together


def seconds(rival: Rival, device: torch.device) -> float:
    """Of an epoch."""
    begun = time.perf_counter()
    rival.epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


SWITCHES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "bf16, channels last": BF16_LAST,
    "bf16, channels last, compiled": BF16_LAST | COMPILED,
}
"""What trainings and plain loops are compared with, by name."""


@dataclass(frozen=True)
class Entry:
    """A rival, and the name of the plain loop that it is compared with."""

    rival: Rival
    switches: str


def rivals(scale: Scale, device: torch.device) -> dict[str, Entry]:
    """All that take turns in one process, by name."""

    def pack(count: int, **options: Any) -> Together:
        return Together([training(device, scale, number, **options) for number in range(count)])

    on_gpu = device.type == "cuda"
    like = training(device, scale)
    made: dict[str, Entry] = {}
    for name, switches in SWITCHES.items():
        # Elsewhere it takes longer than all else: `benchmarks.compiled` is for that.
        if "compile" in switches and not on_gpu:
            continue
        flags = {
            "bf16": "bf16" in name,
            "channels_last": "last" in name,
            "compiled": "compiled" in name,
        }
        made[f"plain loop, {name}"] = Entry(Plain(like, **flags), name)
        made[f"one candidate, {name}, without graphs"] = Entry(
            pack(1, training=switches | NO_GRAPHS), name
        )
        made[f"one candidate, {name}"] = Entry(pack(1, training=switches), name)
    fast = "bf16, channels last"
    for count in scale.packs:
        made[f"pack of {count}, {fast}"] = Entry(pack(count, training=SWITCHES[fast]), fast)
    size = GOAL_SIZE if GOAL_SIZE in scale.packs else scale.packs[-1]
    made[f"pack of {size}, float32"] = Entry(pack(size), "float32")
    made[f"pack of {size}, float32, stacked, without graphs"] = Entry(
        pack(size, training=NO_GRAPHS), "float32"
    )
    if on_gpu:
        compiled = "bf16, channels last, compiled"
        made[f"pack of {size}, {compiled}"] = Entry(
            pack(size, training=SWITCHES[compiled]), compiled
        )
    made[f"one candidate, {fast}, augmented"] = Entry(
        pack(1, training=SWITCHES[fast], augment=AUGMENT), fast
    )
    for name, options in PENALTY_OPTIONS.items():
        made[f"one candidate, {fast}, penalty {name}"] = Entry(
            pack(1, training=SWITCHES[fast], penalties={name: options}), fast
        )
    return made


_others: Barrier


def _meet(others: Barrier) -> None:
    global _others
    _others = others


def _beside_others(scale: Scale, device: torch.device, number: int, count: int) -> float:
    """Seconds of `rounds` epochs of one candidate, on a part of the GPU."""
    torch.set_num_threads(1)
    if device.type == "cuda":  # as trials on a fraction of a GPU have it
        torch.cuda.set_per_process_memory_fraction(1 / count)
    one = Together([training(device, scale, number)])
    seconds(one, device)
    _others.wait(WAIT_S)
    return sum(seconds(one, device) for _ in range(scale.rounds))


def in_processes(scale: Scale, device: torch.device, count: int) -> float:
    """Candidate-epochs per second of so many processes at once, each with a candidate."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _meet, (context.Barrier(count),)) as pool:
        tasks = [
            pool.submit(_beside_others, scale, device, number, count) for number in range(count)
        ]
        return count * scale.rounds / max(task.result() for task in tasks)


def rates(scale: Scale, device: torch.device) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Candidate-epochs per second by name, one value per round, in which all take turns; one alone
    of several processes.

    Also by name: the switches of the plain loop that it is compared with.
    """
    made = rivals(scale, device)
    for name, entry in made.items():  # memory, kernels, the choice of algorithms, recordings
        first, second = seconds(entry.rival, device), seconds(entry.rival, device)
        print(
            f"{name}: {first:.2f} s, then {second:.3f} s for an epoch", file=sys.stderr, flush=True
        )
    found: dict[str, list[float]] = {name: [] for name in made}
    switches = {name: entry.switches for name, entry in made.items()}
    for _ in range(scale.rounds):
        for name, entry in made.items():
            found[name].append(entry.rival.candidates / seconds(entry.rival, device))
    made.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for count in scale.processes:
        shared = f", each with 1/{count} of the GPU" if device.type == "cuda" else ""
        name = f"{count} processes{shared}"
        found[name], switches[name] = [in_processes(scale, device, count)], "float32"
    return found, switches


def over(found: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as many candidate-epochs `name` trains as `other`: the median over rounds."""
    if len(found[name]) != len(found[other]):
        return found[name][0] / statistics.median(found[other])
    return statistics.median(a / b for a, b in zip(found[name], found[other], strict=True))


def as_rows(
    found: dict[str, list[float]], switches: dict[str, str], title: str, per_epoch: int, batch: int
) -> list[dict[str, Any]]:
    """Rows of the table under `title`."""
    rows = []
    for name, values in found.items():
        rate = statistics.median(values)
        switched = over(found, name, f"plain loop, {switches[name]}")
        plain = over(found, name, "plain loop, float32")
        rows.append(
            {
                title: name,
                "images per second": f"{rate * per_epoch:,.0f}",
                "candidate-epochs per hour": f"{3600 * rate:,.0f}",
                "ms per step of a candidate": f"{1e3 * batch / (rate * per_epoch):.3f}",
                "times the plain loop with its switches": f"{switched:.2f}",
                "times the plain loop in float32": f"{plain:.2f}",
            }
        )
    return rows


def _copied_per_second(count: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy of so many float32 numbers."""
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


@torch.no_grad()
def floors(like: Training) -> list[dict[str, Any]]:
    """The least time of a step: its operations and its bytes over the rates of a large matrix
    product and of a large copy.

    Counted are convolutions and linear layers alone: two products in the backward pass for each in
    the forward pass, and for each of the three its two inputs read once and its output written
    once, in bfloat16.
    """
    device = like.device
    large = 8192 if device.type == "cuda" else 256
    first, second = (
        torch.randn(large, large, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    flops_rate = 2 * large**3 / seconds_of(lambda: first @ second, device)
    bytes_rate = _copied_per_second(2**29 if device.type == "cuda" else 2**20, device)
    moved = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moved.append(inputs[0].numel() + output.numel() + module.weight.numel())  # type: ignore[operator]

    layers = [
        module for module in like.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    batch = like.data.prepare(like.data.train.inputs[: like.options.batch_size])
    with FlopCounterMode(display=False) as counter:
        like.model(batch)
    for handle in handles:
        handle.remove()
    flops, moved_bytes = 3 * counter.get_total_flops(), 3 * 2 * sum(moved)
    return [
        {
            "floor": "operations",
            "of a step": f"{flops / 1e9:.1f} GFLOP",
            "measured rate": f"{flops_rate / 1e12:.0f} TFLOP/s",
            "ms": f"{1e3 * flops / flops_rate:.3f}",
        },
        {
            "floor": "bytes",
            "of a step": f"{moved_bytes / 1e6:.0f} MB",
            "measured rate": f"{bytes_rate / 1e12:.2f} TB/s",
            "ms": f"{1e3 * moved_bytes / bytes_rate:.3f}",
        },
    ]


def gpu(arguments: argparse.Namespace) -> Outcome:
    """Images per second of ResNet-20, trained in several ways on one GPU."""
    if not torch.cuda.is_available() and not arguments.quick:
        print(
            "this benchmark needs a GPU, and there is none here; with --quick it shows on the CPU "
            "that it runs",
            file=sys.stderr,
        )
        raise SystemExit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    scale = TINY if device.type == "cpu" else LESS if arguments.quick else FULL
    like = training(device, scale)
    data: Dataset = like.data
    what = "CIFAR-10" if scale.real else "random images of CIFAR-10's shape"
    where = "a GPU" if device.type == "cuda" else "a CPU, with a few images: no measurement"
    for row in floors(like):
        print(" | ".join(row.values()), flush=True)
    found, switches = rates(scale, device)
    title = f"ResNet-20, width {scale.width}, {what}, on {where}"
    rows = as_rows(found, switches, title, len(data.train.targets), scale.batch)
    fast = "bf16, channels last"
    goals = []
    if device.type == "cuda":
        pack = f"pack of {GOAL_SIZE}, {fast}"
        goals.append(
            at_least(
                f"{pack}, over the plain loop with its switches",
                over(found, pack, f"plain loop, {fast}"),
                GOAL,
            )
        )
        for name in SWITCHES:
            value = over(found, f"one candidate, {name}", f"plain loop, {name}")
            goals.append(at_least(f"one candidate over the plain loop, {name}", value, 0.97))
        for name in PENALTY_OPTIONS:
            value = over(found, f"one candidate, {fast}", f"one candidate, {fast}, penalty {name}")
            goals.append(at_most(f"time of an epoch with {name} over that without", value, 1.05))
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("gpu", gpu)
