"""Residual networks with basic blocks (He et al. 2015, arXiv 1512.03385)."""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from slimfront.trainables.models.base import MODELS, Model, Shape


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut: the identity, or a 1×1 projection
    where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        same_shape = stride == 1 and inputs == outputs
        if not same_shape:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            norm = nn.BatchNorm2d(outputs)
            self.shortcut = nn.Sequential(projection, norm)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        branch = self.conv1(x)
        branch = self.bn1(branch)
        branch = self.relu1(branch)
        branch = self.conv2(branch)
        branch = self.bn2(branch)
        shortcut = self.shortcut(x)
        out: Tensor = self.relu2(branch + shortcut)
        return out


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution without a bias, which a batch norm behind it has."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def residual_network(
    stem: list[nn.Module], width: int, blocks: list[int], outputs: int
) -> nn.Module:
    """A stem of `width` output channels, stages of basic blocks that halve the size and double the
    width, and a linear head."""
    layers: list[nn.Module] = [*stem]
    channels = width
    for stage, count in enumerate(blocks):
        doubled = 2**stage
        wider = width * doubled
        for block in range(count):
            stride = 1
            if stage > 0 and block == 0:
                stride = 2
            layers.append(BasicBlock(channels, wider, stride))
            channels = wider
    pooling = nn.AdaptiveAvgPool2d(1)
    head = nn.Linear(channels, outputs)
    layers += [pooling, nn.Flatten(), head]
    network = nn.Sequential(*layers)
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


@MODELS.register("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
class CifarResNet(Model):
    """The CIFAR networks of section 4.2: three stages of n basic blocks, 6n + 2 layers; projections
    as shortcuts (option B).

    `depth` is 6n + 2, from the name where it is left out; `width` is the number of channels of the
    first stage.
    """

    name: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] = "resnet20"
    depth: int | None = Field(None, ge=8)
    width: int = Field(16, ge=1, le=4096)

    @model_validator(mode="after")
    def _depth_is_six_n_plus_two(self) -> Self:
        depth = self.depth
        if depth is not None and depth % 6 != 2:
            raise ValueError(
                f"the depth of a CIFAR ResNet is 6n + 2, such as 20 or 26, and it is {depth}"
            )
        return self

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        depth = self.depth
        if depth is None:
            number = self.name.removeprefix("resnet")
            depth = int(number)
        channels = input_shape[0]
        stem = _small_stem(channels, self.width)
        layers_of_blocks = depth - 2
        blocks_of_stage = layers_of_blocks // 6
        blocks = [blocks_of_stage] * 3
        return residual_network(stem, self.width, blocks, outputs)


@MODELS.register("resnet18")
class ResNet18(Model):
    """Four stages of `depth` basic blocks (2: ResNet-18), from `width` channels.

    Inputs of 64×64 and more get the 7×7 stem with max pooling of the paper's table 1, smaller ones
    a 3×3 stem.
    """

    name: Literal["resnet18"] = "resnet18"
    depth: int = Field(2, ge=1, le=100)
    width: int = Field(64, ge=1, le=4096)

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        channels, *lengths = input_shape
        stem = _small_stem(channels, self.width)
        if min(lengths) >= 64:
            stem[0] = nn.Conv2d(channels, self.width, 7, stride=2, padding=3, bias=False)
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        blocks = [self.depth] * 4
        return residual_network(stem, self.width, blocks, outputs)


def _small_stem(channels: int, width: int) -> list[nn.Module]:
    convolution = _convolution(channels, width)
    norm = nn.BatchNorm2d(width)
    return [convolution, norm, nn.ReLU()]
