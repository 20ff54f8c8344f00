"""LeNet-5 with ReLU and max pooling (LeCun et al. 1998, in its modern form)."""

from typing import Literal

from pydantic import Field
from torch import nn

from slimfront.trainables.models.base import MODELS, Model


@MODELS.register("lenet")
class LeNet(Model):
    """Two 5×5 convolutions, each with ReLU and 2×2 max pooling, then `depth` hidden linear layers.

    `width` multiplies the channels (6, 16) and units (120, 84) of the original. Inputs of 28×28 and
    32×32 alike.
    """

    name: Literal["lenet"] = "lenet"
    depth: int = Field(2, ge=1, le=100)
    width: float = Field(1.0, gt=0, le=1000)

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        channels, height, width = input_shape
        first, second = (max(1, round(c * self.width)) for c in (6, 16))
        units = [max(1, round(u * self.width)) for u in (120, *[84] * (self.depth - 1))]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        layers += [nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        inputs = second * (height // 4) * (width // 4)
        for count in units:
            layers += [nn.Linear(inputs, count), nn.ReLU()]
            inputs = count
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))
