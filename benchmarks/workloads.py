"""Networks, data and plain training for `throughput`: a user's own code, which knows nothing of
slimfront.

What is heavy is imported inside, as in a function that Ray runs in processes of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A network, the data that it learns, and how long. `file` has inputs and labels as torch saved
    them; None: digits."""

    name: str
    network: str
    epochs: int
    batch_size: int
    file: str | None = None


def mlp() -> "nn.Module":
    """Four hidden layers of 128 units."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        *[m for _ in range(3) for m in (nn.Linear(128, 128), nn.ReLU())],
        nn.Linear(128, 10),
    )


def deep_mlp() -> "nn.Module":
    """Ten hidden layers of 50 units."""
    from torch import nn

    layers = [m for _ in range(9) for m in (nn.Linear(50, 50), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), *layers, nn.Linear(50, 10))


def resnet() -> "nn.Module":
    """Three residual blocks of 8, 16 and 32 channels."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            projection = (
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
            self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*projection)
            self.relu = nn.ReLU()

        def forward(self, x: "Tensor") -> "Tensor":
            added: Tensor = self.relu(self.branch(x) + self.shortcut(x))
            return added

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


NETWORKS: dict[str, Callable[[], "nn.Module"]] = {
    "mlp": mlp,
    "deep_mlp": deep_mlp,
    "resnet": resnet,
}


def examples(file: str | None) -> tuple["Tensor", "Tensor"]:
    """Inputs (N, 1, height, width), float32, and labels (N,)."""
    import torch

    if file is not None:
        inputs, labels = torch.load(file, weights_only=True)
        return inputs, labels
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(
        digits.target
    )


def splits(file: str | None) -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
    """Three fifths to train on and one to validate, standardised: inputs and labels of each. The
    rest is the test set."""
    inputs, labels = examples(file)
    first = int(0.6 * len(labels))
    second = first + int(0.2 * len(labels))
    inputs = (inputs - inputs[:first].mean()) / inputs[:first].std()
    return inputs[:first], labels[:first], inputs[first:second], labels[first:second]


def epochs(
    model: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    data: tuple["Tensor", ...],
    workload: Workload,
    l1: float,
) -> Iterator[float]:
    """A plain training loop; gives the validation accuracy after each epoch. `l1` is the strength
    of a lasso on the weights."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, labels, held_inputs, held_labels = data
    for _ in range(workload.epochs):
        model.train()
        for batch in torch.randperm(len(labels)).split(workload.batch_size):
            loss = cross_entropy(model(inputs[batch]), labels[batch])
            if l1:
                loss = loss + l1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(held_inputs).argmax(1) == held_labels).float().mean().item()
        yield accuracy


def assembled(values: dict[str, Any], workload: Workload) -> None:
    """One trial as the documentation of Ray Tune has it: a function that trains, and reports every
    epoch."""
    import torch
    from ray import tune

    model = NETWORKS[workload.network]()
    optimizer = torch.optim.Adam(model.parameters(), lr=values["lr"])
    for accuracy in epochs(model, optimizer, splits(workload.file), workload, values["strength"]):
        kept = sum(int((p.abs() > 1e-3).sum()) for p in model.parameters())
        tune.report({"val_accuracy": accuracy, "nonzero_params": kept})
