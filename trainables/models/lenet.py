"""LeNet-5 with ReLU and max pooling (LeCun et al. 1998, in its modern form)."""

from typing import Literal

from pydantic import Field
from torch import nn

from slimfront.trainables.models.base import MODELS, Model, Shape


@MODELS.register("lenet")
class LeNet(Model):
    """Two 5×5 convolutions, each with ReLU and 2×2 max pooling, then `depth` hidden linear layers.

    `width` multiplies the channels (6, 16) and units (120, 84) of the original. Inputs of 28×28 and
    32×32 alike.
    """

    name: Literal["lenet"] = "lenet"
    depth: int = Field(2, ge=1, le=100)
    width: float = Field(1.0, gt=0, le=1000)

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for wanted in (6, 16):
            wider = self._times_width(wanted)
            convolution = nn.Conv2d(channels, wider, 5, padding=2)
            halving = nn.MaxPool2d(2)
            layers += [convolution, nn.ReLU(), halving]
            channels = wider
        layers.append(nn.Flatten())
        rows = height // 4
        columns = width // 4
        positions = rows * columns
        inputs = channels * positions
        for layer in range(self.depth):
            original = 84
            if layer == 0:
                original = 120
            units = self._times_width(original)
            linear = nn.Linear(inputs, units)
            layers += [linear, nn.ReLU()]
            inputs = units
        head = nn.Linear(inputs, outputs)
        layers.append(head)
        return nn.Sequential(*layers)

    def _times_width(self, count: int) -> int:
        scaled = round(count * self.width)
        return max(1, scaled)
