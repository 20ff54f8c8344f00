"""The networks of `width`, their data and the plain training of peers.

Torch alone, so that peers can import it in environments of their own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What all methods train with: SGD with momentum on a cosine, crops and flips."""

    epochs: int = 12
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 2


class _Basic(nn.Module):
    """The block of a ResNet: two convolutions, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.first_relu = nn.ReLU()
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first_relu(self.first_norm(self.first(x)))
        added: Tensor = self.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))
        return added


class _Inverted(nn.Module):
    """The block of a MobileNetV2: wider, depthwise, narrow again."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int = 4) -> None:
        super().__init__()
        wide = inputs * widen
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.branch(x)
        if self.residual:
            return x + made
        return made


def _with_head(channels: int, stem: int, blocks: list[nn.Module]) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(channels, stem, 3, 1, 1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with torch.no_grad():
        width = network.eval()(torch.zeros(1, channels, 16, 16)).shape[1]
    network.append(nn.Linear(width, 10))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network.train()


def resnet8(channels: int = 3, width: int = 8) -> nn.Module:
    """Three residual blocks of 8, 16 and 32 channels."""
    return _resnet(channels, width, 1)


def resnet20(channels: int = 3, width: int = 8) -> nn.Module:
    """Nine residual blocks, three of 8, 16 and 32 channels each."""
    return _resnet(channels, width, 3)


def _resnet(channels: int, width: int, per_stage: int) -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for number in range(per_stage):
            stride = 2 if stage and not number else 1
            blocks.append(_Basic(inputs, outputs, stride))
            inputs = outputs
    return _with_head(channels, width, blocks)


def mobilenet(channels: int = 3, width: int = 8) -> nn.Module:
    """Five inverted residual blocks of 8, 16 and 32 channels."""
    blocks: list[nn.Module] = [
        _Inverted(width, width, 1),
        _Inverted(width, 2 * width, 2),
        _Inverted(2 * width, 2 * width, 1),
        _Inverted(2 * width, 4 * width, 2),
        _Inverted(4 * width, 4 * width, 1),
    ]
    return _with_head(channels, width, blocks)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"ResNet-8": resnet8, "MobileNetV2": mobilenet}

Splits = dict[str, tuple[Tensor, Tensor]]
"""Inputs (N, channels, height, width), normalised, and labels (N,), by split."""


def normalised(splits: Splits) -> Splits:
    """With the mean and the deviation of the training split."""
    mean, deviation = splits["train"][0].mean(), splits["train"][0].std()
    return {name: ((inputs - mean) / deviation, y) for name, (inputs, y) in splits.items()}


def batches(
    splits: Splits, recipe: Recipe, seed: int, epochs: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The steps of a training: its number, and a batch, cropped and flipped."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = splits["train"]
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
            yield step, _augmented(inputs[chosen], recipe.crop, generator), labels[chosen]
            step += 1


def _augmented(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    count, height, width = len(images), images.shape[2], images.shape[3]
    padded = nn.functional.pad(images, [crop] * 4)
    tops = torch.randint(0, 2 * crop + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(0, 2 * crop + 1, (count,), generator=generator).tolist()
    flips = (torch.rand(count, generator=generator) < 0.5).tolist()
    made = []
    for image, top, left, flip in zip(padded, tops, lefts, flips, strict=True):
        part = image[:, top : top + height, left : left + width]
        made.append(part.flip(-1) if flip else part)
    return torch.stack(made)


def cosine(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate at a step of so many."""
    return recipe.lr / 2 * (1 + math.cos(math.pi * step / steps))


def steps_of(splits: Splits, recipe: Recipe, epochs: int) -> int:
    """How many steps so many epochs have."""
    return epochs * math.ceil(len(splits["train"][0]) / recipe.batch_size)


def accuracy(network: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """The share of a split's examples whose class is told right."""
    network.eval()
    right = 0
    with torch.no_grad():
        for inputs, labels in zip(split[0].split(500), split[1].split(500), strict=True):
            right += int((network(inputs).argmax(1) == labels).sum())
    return right / len(split[1])
