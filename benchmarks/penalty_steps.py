"""Time of a training step with each penalty, as a ratio to the step without: ResNet-20, batch 128, interleaved medians."""

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.common import Outcome, at_most, run
from trainables import Candidate
from trainables.models import CifarResNet
from trainables.optimizers import build_optimizer
from trainables.penalties import PENALTIES
from trainables.penalties.base import ActivePenalty

PENALTY_OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {"strength": 0.1},
    "node": {"strength": 0.1},
    "connection": {"strength": 1e-4},
    "block": {"strength": 0.1},
    "cka": {"strength": 1e-4, "samples": 8, "every": 5},
    "aug_cka": {"strength": 1e-4, "samples": 8, "every": 5},
}
GOAL = 1.05


class Stepper:
    """One network that trains on the same random batch, under one penalty or none."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = CifarResNet().build((3, 32, 32), 10).to(device).train()
        self.optimizer = build_optimizer("sgd", self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.inputs = torch.randn(batch, 3, 32, 32, device=device)
        self.labels = torch.randint(10, (batch,), device=device)
        self.penalty: ActivePenalty | None = None
        if name:
            options = Candidate.model_validate({"penalties": {name: PENALTY_OPTIONS[name]}}).penalties[name]
            self.penalty = options.attach(self.model, self.inputs[:8])
        self.step = 0

    def train_step(self) -> None:
        """One step as `Training` makes it."""
        if self.penalty:
            self.penalty.before_batch(self.step, 1.0)
        loss = torch.nn.functional.cross_entropy(self.model(self.inputs), self.labels)
        extra = self.penalty.loss() if self.penalty else None
        self.optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()
        if self.penalty:
            self.penalty.proximal(0.1)
        self.step += 1


def penalty_steps(arguments: argparse.Namespace) -> Outcome:
    """Step times of ResNet-20 with each penalty over those without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = 5 if arguments.quick else 40  # a multiple of 5, since CKA-SR looks at every fifth batch
    batch = 16 if arguments.quick else 128
    names = ["", *PENALTY_OPTIONS]
    assert set(PENALTY_OPTIONS) == set(PENALTIES)
    steppers = [Stepper(name, batch, device) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, stepper in zip(names, steppers, strict=True):
            started = time.perf_counter()
            stepper.train_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - started)
    rows, goals = [], []
    for name in names[1:]:
        # The ratio of each step to the plain step of the same round: what the machine does besides hits both alike.
        ratios = [mine / plain for mine, plain in zip(times[name], times[""], strict=True)]
        median = statistics.median(ratios)
        # CKA-SR and AugCKA-SR work in one batch of five, so that its cost is in the mean over rounds, not in the median step.
        cost = sum(times[name]) / sum(times[""]) if "every" in PENALTY_OPTIONS[name] else median
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "penalty": name,
                "ms per step": f"{1e3 * statistics.median(times[name]):.1f}",
                "ms without": f"{1e3 * statistics.median(times['']):.1f}",
                "ratio": f"{cost:.3f}",
                "quartiles of the ratio": f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
            }
        )
        goals.append(at_most(f"step ratio with {name}, batch {batch}", cost, GOAL))
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("penalty_steps", penalty_steps)
