"""Multilayer perceptron."""

import math
from typing import Literal

from pydantic import Field
from torch import nn

from slimfront.trainables.models.base import MODELS, Model, Shape


@MODELS.register("mlp")
class MLP(Model):
    """`depth` hidden layers of `width` units with ReLU, then a linear output layer."""

    name: Literal["mlp"] = "mlp"
    depth: int = Field(4, ge=1, le=1000)
    width: int = Field(64, ge=1, le=1_000_000)

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = math.prod(input_shape)
        for _ in range(self.depth):
            linear = nn.Linear(inputs, self.width)
            layers += [linear, nn.ReLU()]
            inputs = self.width
        layers.append(nn.Linear(inputs, outputs))
        return nn.Sequential(*layers)
