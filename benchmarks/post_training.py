"""Pruning without training, on networks trained for digits: what is left of their accuracy, where
what is left of the layers is fitted to what they gave, and where only the statistics of batch norms
are taken again, or nothing."""

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Outcome, at_least, run, spread
from slimfront import Candidate, prune
from slimfront.trainables.data import Dataset, load_once
from slimfront.trainables.models import CifarResNet, built

EXAMPLES, BATCH = 512, 64
AMOUNTS: list[dict[str, Any]] = [
    {"channels": 0.2},
    {"channels": 0.35},
    {"channels": 0.5},
    {"weights": 0.8},
    {"weights": 0.9},
    {"layers": 1},
    {"layers": 3},
]
CORRECTIONS: list[dict[str, Any]] = [
    {},
    {"fit": False},
    {"fit": False, "recalibrate": False},
]


class SmallCNN(nn.Module):
    """Two convolutions with batch norms, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * 4, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))
        return out


def trained(network: nn.Module, data: Dataset, epochs: int) -> nn.Module:
    """The network after plain training with Adam, as a user would have it."""
    inputs, targets = data.prepare(data.train.inputs), data.train.targets
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    return network.eval()


def post_training(arguments: argparse.Namespace) -> Outcome:
    """A small CNN and a ResNet-14, pruned on 512 training examples."""
    data = load_once(Candidate().data, torch.device("cpu"), Candidate().task)
    seeds, epochs, amounts = 3, 12, AMOUNTS
    if arguments.quick:
        seeds, epochs, amounts = 1, 2, AMOUNTS[::4]
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for seed in range(seeds):
        for name in ("small CNN", "ResNet-14"):
            torch.manual_seed(seed)
            made = (
                SmallCNN() if name == "small CNN" else built(CifarResNet(depth=14, width=8), data)
            )
            network = trained(made, data, epochs)
            for amount in amounts:
                what = ", ".join(f"{kind}={value}" for kind, value in amount.items())
                for by in ("loss", "norm"):
                    if by == "norm" and "layers" in amount:
                        continue  # the same: no loss is asked for
                    if amount.get("layers", 0) > 1 and name == "small CNN":
                        continue  # it has one that can go
                    measured = _accuracies(network, data, amount, by)
                    found.setdefault((name, what, by), []).append(measured)
    rows = []
    gains = []
    for (name, what, by), results in found.items():
        dense, fitted, again, kept = zip(*results, strict=True)
        gains.append(statistics.mean(fitted) - statistics.mean(again))
        rows.append(
            {
                "network": name,
                "what goes": what,
                "by": "outputs" if "layers" in what else by,
                "as given": spread(dense, 4),
                "fitted": spread(fitted, 4),
                "batch norms taken again": spread(again, 4),
                "neither": spread(kept, 4),
            }
        )
    goal = at_least("mean gain in accuracy by fitting", statistics.mean(gains), 0)
    return Outcome(seeds, rows, [goal])


def _accuracies(network: nn.Module, data: Dataset, amount: dict[str, Any], by: str) -> list[float]:
    """On the test split: as given, and with each of the corrections."""
    inputs, targets = data.prepare(data.train.inputs[:EXAMPLES]), data.train.targets[:EXAMPLES]
    batches: list[Any] = list(inputs.split(BATCH))
    loss = None
    if by == "loss":
        batches = list(zip(batches, targets.split(BATCH), strict=True))
        loss = nn.functional.cross_entropy
    found = [network]
    for correction in CORRECTIONS:
        made = prune(network, batches, loss=loss, **correction, **amount)
        found.append(made.network)
    return [
        data.task.evaluate(each, *data.test, "test", prepare=data.prepare)["test_accuracy"]
        for each in found
    ]


if __name__ == "__main__":
    run("post_training", post_training)
