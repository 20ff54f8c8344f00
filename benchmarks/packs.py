"""Candidates trained in packs against the same one by one: candidate-epochs per second on one core,
interleaved."""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import Outcome, at_least, run
from slimfront import Candidate
from slimfront.trainables.packs import Pack
from slimfront.trainables.training.loop import Training

ALONE = 4
"""So many candidates are trained one by one."""
SIZES = (1, 4, 16, 32)
ROUNDS = 3
EPOCHS_OF_PRODUCTS = 10
GOAL = 3.0
GOAL_SIZE = 16

MLP: dict[str, Any] = {"model": {"name": "mlp", "depth": 4, "width": 64}}
RESNET: dict[str, Any] = {"model": {"name": "resnet20", "width": 8}}
WIDE: dict[str, Any] = {"model": {"name": "mlp", "depth": 4, "width": 128}}
SPARSE: dict[str, Any] = {
    "penalties": {"layer": {"strength": 1.0}},
    "sparsifier": {"name": "magnitude", "sparsity": 0.5},
}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "MLP 4×64": (MLP, 4),
    "MLP 4×64, layer penalty, magnitude": (MLP | SPARSE, 4),
    "MLP 4×128, lasso": (WIDE | {"penalties": {"connection": {"strength": 1e-4}}}, 4),
    "ResNet-20, width 8": (RESNET, 1),
}
"""Candidates on digits, and how many epochs of them are timed at once."""


def candidate(options: dict[str, Any], number: int) -> Candidate:
    """One of many that differ in numbers alone."""
    tree = options | {"training": {"epochs": 1000, "seed": number, "lr": 1e-3 * (1 + number % 5)}}
    if "sparsifier" in tree:
        tree["penalties"] = {"layer": {"strength": 0.1 * (1 + number)}}
        tree["sparsifier"] = options["sparsifier"] | {"sparsity": 0.5 + 0.01 * number}
        tree["training"]["epochs"] = 20  # of which masks change in two thirds, as in a search
    return Candidate.model_validate(tree)


class Rival:
    """Some candidates, trained in one way; it begins anew when they are done."""

    def __init__(self, options: dict[str, Any], size: int | None, device: torch.device) -> None:
        """`size` of the pack; None: one by one."""
        self.candidates = [candidate(options, number) for number in range(size or ALONE)]
        self.packed = size is not None
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Builds them, and trains an epoch that is not timed."""
        self.trainings = [Training(candidate, self.device) for candidate in self.candidates]
        self.pack = Pack(self.trainings if self.packed else (), self.device)
        self._epoch()

    def rate(self, epochs: int) -> float:
        """Candidate-epochs per second of one core; of wall time on a GPU."""
        if self.trainings[0].epoch + epochs > self.trainings[0].options.epochs:
            self.begin()
        clock: Callable[[], float] = (
            time.process_time if self.device.type == "cpu" else time.perf_counter
        )
        started = clock()
        for _ in range(epochs):
            self._epoch()
        return len(self.trainings) * epochs / (clock() - started)

    def _epoch(self) -> None:
        if self.packed:
            self.pack.run_epoch()
            return
        for training in self.trainings:
            training.run_epoch()


def products_alone(training: Training, size: int) -> float | None:
    """Candidate-epochs per second if steps were nothing but the products of their linear layers;
    None with other layers.

    Those of `size` candidates at once, forward and backward: no pack of so many can be faster with
    these kernels.
    """
    modules = list(training.model.modules())
    if any(isinstance(module, nn.Conv2d) for module in modules):
        return None
    layers, batch = (
        [module for module in modules if isinstance(module, nn.Linear)],
        training.options.batch_size,
    )
    made = [
        (
            torch.randn(size, m.out_features, m.in_features),
            torch.randn(size, m.in_features, batch),
            torch.randn(size, m.out_features, batch),
        )
        for m in layers
    ]
    steps = math.ceil(len(training.data.train.targets) / batch)

    def epoch() -> None:
        for _ in range(steps):
            for number, (weight, inputs, gradient) in enumerate(made):
                torch.bmm(weight, inputs)
                torch.bmm(gradient, inputs.transpose(1, 2))
                if number:
                    torch.bmm(weight.transpose(1, 2), gradient)

    epoch()
    started = time.process_time()
    for _ in range(EPOCHS_OF_PRODUCTS):
        epoch()
    return size * EPOCHS_OF_PRODUCTS / (time.process_time() - started)


def packs(arguments: argparse.Namespace) -> Outcome:
    """Rates of packs over those one by one, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (1, 4, 16) if arguments.quick else SIZES
    rows, goals = [], []
    for name, (options, epochs) in CASES.items():
        rivals = {size: Rival(options, size, device) for size in (None, *sizes)}
        rates: dict[int | None, list[float]] = {size: [] for size in rivals}
        for _ in range(1 if arguments.quick else ROUNDS):
            for size, rival in rivals.items():
                rates[size].append(rival.rate(1 if arguments.quick else epochs))
        factors = {
            size: statistics.median(a / b for a, b in zip(rates[size], rates[None], strict=True))
            for size in rates
        }
        for size in rates:
            per_second = statistics.median(rates[size])
            how = "one by one" if size is None else f"pack of {size}"
            bound = (
                products_alone(rivals[size].trainings[0], size or 1)
                if device.type == "cpu"
                else None
            )
            rows.append(
                {
                    "candidates on digits": name,
                    "trained": how,
                    "candidate-epochs per core-second": f"{per_second:.1f}",
                    "times one by one": f"{factors[size]:.2f}",
                    "of the products alone": "" if bound is None else f"{per_second / bound:.0%}",
                }
            )
        if name.startswith("MLP"):
            goals.append(
                at_least(f"pack of {GOAL_SIZE} over one by one, {name}", factors[GOAL_SIZE], GOAL)
            )
    torch.set_num_threads(threads)
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("packs", packs)
