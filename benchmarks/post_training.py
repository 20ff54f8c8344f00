"""Pruning without training, on networks trained for digits: what is left of their accuracy, with
the statistics of batch norms taken again and as they were."""

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
    {"weights": 0.8},
    {"layers": 1},
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
        seeds, epochs, amounts = 1, 2, AMOUNTS[::3]
    found: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
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
                    measured = _accuracies(network, data, amount, by)
                    found.setdefault((name, what, by), []).append(measured)
    rows = []
    gains = []
    for (name, what, by), results in found.items():
        dense, again, kept = zip(*results, strict=True)
        gains.append(statistics.mean(again) - statistics.mean(kept))
        rows.append(
            {
                "network": name,
                "what goes": what,
                "by": "outputs" if "layers" in what else by,
                "as given": spread(dense, 4),
                "batch norms taken again": spread(again, 4),
                "batch norms as they were": spread(kept, 4),
            }
        )
    goal = at_least("mean gain in accuracy of taking them again", statistics.mean(gains), 0)
    return Outcome(seeds, rows, [goal])


def _accuracies(
    network: nn.Module, data: Dataset, amount: dict[str, Any], by: str
) -> tuple[float, float, float]:
    """On the test split: as given, with batch norms taken again, and with them as they were."""
    inputs, targets = data.prepare(data.train.inputs[:EXAMPLES]), data.train.targets[:EXAMPLES]
    batches: list[Any] = list(inputs.split(BATCH))
    loss = None
    if by == "loss":
        batches = list(zip(batches, targets.split(BATCH), strict=True))
        loss = nn.functional.cross_entropy
    found = [network]
    for recalibrate in (True, False):
        made = prune(network, batches, loss=loss, recalibrate=recalibrate, **amount)
        found.append(made.network)
    first, again, kept = (
        data.task.evaluate(each, *data.test, "test", prepare=data.prepare)["test_accuracy"]
        for each in found
    )
    return first, again, kept


if __name__ == "__main__":
    run("post_training", post_training)
