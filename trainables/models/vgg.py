"""VGG with batch norm (Simonyan, Zisserman 2014, arXiv 1409.1556, table 1) and one linear layer as
its head."""

from typing import Literal

from pydantic import Field
from torch import nn

from slimfront.trainables.models.base import MODELS, Model, Shape

_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@MODELS.register("vgg")
class VGG(Model):
    """3×3 convolutions with batch norm and ReLU in five stages, each ending in 2×2 max pooling
    while there is space to halve.

    `depth` counts as the paper does; `width` is the number of channels of the first stage, doubled
    to at most 8 times.
    """

    name: Literal["vgg"] = "vgg"
    depth: Literal[11, 13, 16, 19] = 16
    width: int = Field(64, ge=1, le=4096)

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        channels, *lengths = input_shape
        size = min(lengths)
        layers: list[nn.Module] = []
        convolutions = _CONVOLUTIONS[self.depth]
        for stage, count in enumerate(convolutions):
            doubled = 2**stage
            times = min(doubled, 8)
            width = self.width * times
            for _ in range(count):
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                norm = nn.BatchNorm2d(width)
                layers += [convolution, norm, nn.ReLU()]
                channels = width
            if size > 1:
                halving = nn.MaxPool2d(2)
                layers.append(halving)
                size //= 2
        pooling = nn.AdaptiveAvgPool2d(1)
        head = nn.Linear(channels, outputs)
        layers += [pooling, nn.Flatten(), head]
        return nn.Sequential(*layers)
