"""Times of training steps of ResNet-20 under a penalty, interleaved with plain steps: what the
benchmarks of penalties share."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from slimfront.trainables.models import CifarResNet
from slimfront.trainables.penalties import ActivePenalty, Penalty
from slimfront.trainables.training.optimizers import build_optimizer
from slimfront.trainables.training.slimming import Slimming


class Stepper:
    """One ResNet-20 that trains on the same random batch, under one penalty or none."""

    def __init__(self, penalty: Penalty | None, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = CifarResNet().build((3, 32, 32), 10).to(device).train()
        self.optimizer = build_optimizer(
            "sgd", self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.inputs = torch.randn(batch, 3, 32, 32, device=device)
        self.targets = torch.randint(10, (batch,), device=device)
        self.penalty: ActivePenalty | None = (
            penalty.attach(self.model, self.inputs[:8]) if penalty else None
        )
        self.step = 0

    def train_step(self) -> None:
        """One step as `Training` makes it."""
        if self.penalty:
            self.penalty.before_batch(self.step, 1.0)
        loss = torch.nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        extra = self.penalty.loss() if self.penalty else None
        self.optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()
        if self.penalty:
            self.penalty.proximal(0.1)
        self.step += 1


class SlimmedStepper(Stepper):
    """A loop of a user's with Slimming in it, whose sparsifier acts in every tenth step."""

    def __init__(self, asked: Mapping[str, Any], batch: int, device: torch.device) -> None:
        super().__init__(None, batch, device)
        self.slim = Slimming(self.model, self.optimizer, self.inputs[:8], steps=10_000, **asked)

    def train_step(self) -> None:
        """One step as in docs/own-training.md."""
        loss = torch.nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        loss = loss + self.slim.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.slim.before_step()
        self.optimizer.step()
        self.slim.after_step()


def interleaved(steppers: Mapping[str, Stepper], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by name: in every round each makes one step, and the first round does
    not count."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(rounds + 1):
        for name, stepper in steppers.items():
            started = time.perf_counter()
            stepper.train_step()
            if stepper.inputs.is_cuda:
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def step_ratio(mine: list[float], plain: list[float], every: int = 1) -> tuple[float, float, float]:
    """The cost of a step over the plain step of the same round: the median ratio, and quartiles.

    For a penalty that looks at every n-th batch only, the medians of both kinds of steps are
    weighed by how many there are: neither what the machine does besides nor the rarer kind is lost.
    """
    ratios = [a / b for a, b in zip(mine, plain, strict=True)]
    # The first step was left out.
    looking = [ratio for number, ratio in enumerate(ratios, start=1) if number % every == 0]
    others = [ratio for number, ratio in enumerate(ratios, start=1) if number % every]
    cost = statistics.median(looking) / every + (
        statistics.median(others) * (every - 1) / every if others else 0.0
    )
    quartiles = statistics.quantiles(ratios, n=4)
    return cost, quartiles[0], quartiles[2]
