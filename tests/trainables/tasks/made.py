"""Small data sets and networks of every task, for tests; factories by import path."""

from typing import Any

import torch
from torch import Tensor, nn

HERE = "tests.trainables.tasks.made"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def features(count: int = 240) -> Tensor:
    return torch.randn(count, 6, generator=_generator())


def classes() -> tuple[Tensor, Tensor]:
    x = features()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def numbers() -> tuple[Tensor, Tensor]:
    x = features()
    return x, 200 + 30 * x[:, 0] - 20 * x[:, 1] * x[:, 2].sign()


def several_numbers() -> tuple[Tensor, Tensor]:
    x, y = numbers()
    return x, torch.stack([y, x[:, 3]], 1)


def labels() -> tuple[Tensor, Tensor]:
    x = features()
    return x, (x[:, :3] > 0.3).long()


def squares() -> tuple[Tensor, Tensor]:
    """Noisy images with a bright square, and where it is."""
    generator = _generator()
    images = torch.randn(80, 1, 12, 12, generator=generator) * 0.3
    masks = torch.zeros(80, 12, 12, dtype=torch.int64)
    corners = torch.randint(0, 6, (80, 2), generator=generator)
    for number, (top, left) in enumerate(corners.tolist()):
        masks[number, top : top + 6, left : left + 6] = 1
    return images + masks[:, None], masks


def sentences() -> tuple[dict[str, Tensor], Tensor]:
    """Token ids with a mask, and whether more of them are odd than even."""
    generator = _generator()
    ids = torch.randint(2, 30, (240, 9), generator=generator)
    lengths = torch.randint(3, 10, (240,), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    odd = ((ids % 2) * mask).sum(1)
    return {"input_ids": ids * mask, "attention_mask": mask}, (2 * odd > lengths).long()


def tagged() -> tuple[dict[str, Tensor], Tensor]:
    """The same, and whether each token is odd; −100 where there is none."""
    inputs, _ = sentences()
    tags = inputs["input_ids"] % 2
    return inputs, tags.masked_fill(inputs["attention_mask"] == 0, -100)


class UNet(nn.Module):
    """One level down and up, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.down(x)
        made: Tensor = self.head(
            torch.cat([shortcut, self.up(self.middle(self.pool(shortcut)))], 1)
        )
        return made


class Reader(nn.Module):
    """The mean of the embeddings of tokens, and a hidden layer; outputs by name."""

    def __init__(self, outputs: int = 2, each: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.hidden = nn.Linear(8, 24)
        self.head = nn.Linear(24, outputs)
        self.each = each

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        if not self.each and attention_mask is not None:
            mask = attention_mask.unsqueeze(-1).to(x.dtype)
            x = (x * mask).sum(1) / mask.sum(1)
        x = torch.relu(self.hidden(x)) * scale
        return {"hidden": x, "logits": self.head(x)}


_MLP = {"name": "mlp", "depth": 2, "width": 24}

JOBS: dict[str, dict[str, Any]] = {
    "classification": {
        "task": {"name": "classification", "metrics": ["accuracy", "f1", "auroc"]},
        "data": {"factory": f"{HERE}:classes"},
        "model": _MLP,
    },
    "weighted": {
        "task": {
            "name": "classification",
            "class_weights": "balanced",
            "label_smoothing": 0.1,
            "metrics": "balanced_accuracy",
        },
        "data": {"factory": f"{HERE}:classes"},
        "model": _MLP,
    },
    "regression": {
        "task": "regression",
        "data": {"factory": f"{HERE}:numbers"},
        "model": _MLP,
    },
    "several": {
        "task": {"name": "regression", "loss": "huber", "metrics": ["mae", "r2"]},
        "data": {"factory": f"{HERE}:several_numbers"},
        "model": _MLP,
    },
    "multilabel": {
        "task": {"name": "multilabel", "class_weights": "balanced"},
        "data": {"factory": f"{HERE}:labels"},
        "model": _MLP,
    },
    "segmentation": {
        "task": "segmentation",
        "data": {"factory": f"{HERE}:squares"},
        "model": {"factory": f"{HERE}:UNet"},
    },
    "sequence": {
        "task": {"name": "sequence", "output": "logits"},
        "data": {"factory": f"{HERE}:sentences"},
        "model": {"factory": f"{HERE}:Reader"},
    },
    "tokens": {
        "task": {"name": "tokens", "output": "logits"},
        "data": {"factory": f"{HERE}:tagged"},
        "model": {"factory": f"{HERE}:Reader", "args": {"each": True}},
    },
}
"""A candidate of each task, as plain data."""
