"""Training on a GPU: a residual network on images of CIFAR-10's shape, one candidate, packs and processes against a plain loop.

Not among those of `make bench`, which runs on machines without a GPU; there, `--quick` shows on a small network that it works.
On one with a GPU, `python -m benchmarks gpu` writes the table into the docs.
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

from benchmarks.common import Outcome, at_least, run
from benchmarks.penalty_steps import PENALTY_OPTIONS
from trainables import Candidate
from trainables.data import Dataset
from trainables.packs import Pack
from trainables.training import Training

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
GOAL, GOAL_SIZE = 5.0, 16
EPOCHS = 10**6
"""No training ends here."""
WAIT_S = 600
"""The longest wait for the others of several processes."""

BF16 = {"precision": "bf16"}
BF16_LAST = BF16 | {"channels_last": True}
COMPILED = {"compile": True}
AUGMENT = {"crop": 4, "flip": True}


@dataclass(frozen=True)
class Scale:
    """How much is trained: images (of which a fifth validate) per epoch, in batches, and timed epochs of each rival."""

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


FULL = Scale(16, 128, 20_000, 3, (2, 4, 8, 16, 32), (2, 4, 8, 16))
LESS = Scale(16, 128, 4_000, 1, (2, 16), (2, 4))
TINY = Scale(8, 16, 80, 1, (2,), (2,))
"""Without a GPU: that it runs, and nothing about speed."""


def images(count: int) -> tuple[Tensor, Tensor]:
    """Random images of CIFAR-10's shape, uint8, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), labels


def tree(
    scale: Scale, number: int = 0, training: dict[str, Any] | None = None, augment: Any = None, **more: Any
) -> dict[str, Any]:
    """The config of candidate `number`, which differs from the others in its seed and learning rate."""
    if scale.real:
        data: dict[str, Any] = {"name": "huggingface", "path": str(CIFAR), "limit": scale.images}
    else:
        data = {"name": "factory", "factory": "benchmarks.gpu:images", "args": {"count": scale.images}, "test": 0.2}
    numbers = {"epochs": EPOCHS, "batch_size": scale.batch, "seed": number, "lr": 0.05 / (1 + number % 4)}
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
    """The loop that a user would write: torch alone, normalised images on the device, and no data loader."""

    candidates = 1

    def __init__(self, like: Training, bf16: bool = False, channels_last: bool = False) -> None:
        """It trains what `like` trains."""
        data, self.batch, self.bf16 = like.data, like.options.batch_size, bf16
        layout = torch.channels_last if channels_last else torch.contiguous_format
        inputs = (data.prepare(split.inputs).to(memory_format=layout) for split in (data.train, data.validation))
        self.inputs, self.held_inputs = inputs
        self.labels, self.held_labels = data.train.labels, data.validation.labels
        self.model = like.candidate.model.build(data.input_shape, data.classes).to(data.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def epoch(self) -> None:
        """Trains one, and takes the validation accuracy."""
        self.model.train()
        device = self.inputs.device
        for batch in torch.randperm(len(self.labels), device=device).split(self.batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(self.inputs[batch])
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(outputs.float(), self.labels[batch]).backward()
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
        for result in self.pack.run_epoch().values() if self.pack else [self.trainings[0].run_epoch()]:
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


def rivals(scale: Scale, device: torch.device) -> dict[str, Rival]:
    """All that take turns in one process, by name."""

    def pack(count: int, **options: Any) -> Together:
        return Together([training(device, scale, number, **options) for number in range(count)])

    plain = training(device, scale)
    made: dict[str, Rival] = {
        "plain loop": Plain(plain),
        "plain loop, bf16, channels last": Plain(plain, bf16=True, channels_last=True),
        "one candidate": Together([plain]),
        "one candidate, bf16": pack(1, training=BF16),
        "one candidate, bf16, channels last": pack(1, training=BF16_LAST),
        "one candidate, augmented": pack(1, augment=AUGMENT),
    }
    if device.type == "cuda":  # elsewhere it takes longer than all else, and shows nothing new: `benchmarks.compiled` is for that
        made["one candidate, compiled"] = pack(1, training=COMPILED)
        made["one candidate, bf16, channels last, compiled"] = pack(1, training=BF16_LAST | COMPILED)
    made |= {f"pack of {count}": pack(count) for count in scale.packs}
    made |= {f"pack of {count}, bf16": pack(count, training=BF16) for count in scale.packs}
    size = GOAL_SIZE if GOAL_SIZE in scale.packs else scale.packs[-1]
    made[f"pack of {size}, augmented"] = pack(size, augment=AUGMENT)
    for name, options in PENALTY_OPTIONS.items():
        made[f"one candidate, penalty {name}"] = pack(1, penalties={name: options})
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
        tasks = [pool.submit(_beside_others, scale, device, number, count) for number in range(count)]
        return count * scale.rounds / max(task.result() for task in tasks)


def rates(scale: Scale, device: torch.device) -> dict[str, list[float]]:
    """Candidate-epochs per second by name: one value per round, in which all take turns; one alone of several processes."""
    made = rivals(scale, device)
    for rival in made.values():  # memory, kernels, the choice of algorithms
        seconds(rival, device)
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(scale.rounds):
        for name, rival in made.items():
            found[name].append(rival.candidates / seconds(rival, device))
    made.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for count in scale.processes:
        shared = f", each with 1/{count} of the GPU" if device.type == "cuda" else ""
        found[f"{count} processes{shared}"] = [in_processes(scale, device, count)]
    return found


def as_rows(found: dict[str, list[float]], title: str, per_epoch: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table under `title`, and what each trains over the plain loop, by name."""

    def over(name: str, other: str) -> float:
        if len(found[name]) != len(found[other]):
            return found[name][0] / statistics.median(found[other])
        return statistics.median(a / b for a, b in zip(found[name], found[other], strict=True))

    rows = []
    for name, values in found.items():
        rate = statistics.median(values)
        rows.append(
            {
                title: name,
                "images per second": f"{rate * per_epoch:,.0f}",
                "candidate-epochs per hour": f"{3600 * rate:,.0f}",
                "times the plain loop": f"{over(name, 'plain loop'):.2f}",
                "time over that without a penalty": f"{over('one candidate', name):.3f}" if "penalty" in name else "",
            }
        )
    return rows, {name: over(name, "plain loop") for name in found}


def gpu(arguments: argparse.Namespace) -> Outcome:
    """Images per second of ResNet-20, trained in several ways on one GPU."""
    if not torch.cuda.is_available() and not arguments.quick:
        print(
            "this benchmark needs a GPU, and there is none here; with --quick it shows on the CPU that it runs", file=sys.stderr
        )
        raise SystemExit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    scale = TINY if device.type == "cpu" else LESS if arguments.quick else FULL
    data: Dataset = training(device, scale).data
    what = "CIFAR-10" if scale.real else "random images of CIFAR-10's shape"
    where = "a GPU" if device.type == "cuda" else "a CPU, with a few images: no measurement"
    rows, times = as_rows(rates(scale, device), f"ResNet-20, width {scale.width}, {what}, on {where}", len(data.train.labels))
    goal = f"pack of {GOAL_SIZE}"
    goals = [at_least(f"candidate-epochs per hour, {goal} over the plain loop", times[goal], GOAL)] if goal in times else []
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("gpu", gpu)
