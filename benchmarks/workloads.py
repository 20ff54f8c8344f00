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
    trials: tuple[int, ...] = (12, 64, 192)
    """How many of each way, (a), (b) and (c); without the last, (c) is left out."""
    rounds: int = 3


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
    return residual((8, 16, 32), blocks=1)


def resnet20() -> "nn.Module":
    """A ResNet-20: nine residual blocks of 16, 32 and 64 channels."""
    return residual((16, 32, 64), blocks=3)


def residual(widths: tuple[int, ...], blocks: int) -> "nn.Module":
    """Stages of so many residual blocks on grey images; each but the first halves their sides."""
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

    inputs = widths[0]
    layers = [nn.Conv2d(1, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(inputs, width, stride))
            inputs = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return nn.Sequential(*layers, *head)


def vgg11() -> "nn.Module":
    """A VGG-11 of a quarter of its width, with batch norms, for grey images of 28 × 28."""
    from torch import nn

    layers: list[nn.Module] = []
    inputs = 1
    for place, width in enumerate((16, 32, 64, 64, 128, 128, 128, 128)):
        layers += [nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if place in (0, 1, 3, 5):
            layers.append(nn.MaxPool2d(2))
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))


NETWORKS: dict[str, Callable[[], "nn.Module"]] = {
    "mlp": mlp,
    "deep_mlp": deep_mlp,
    "resnet": resnet,
    "resnet20": resnet20,
    "vgg11": vgg11,
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
