"""Multilayer perceptron."""

import math
from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import nn

from slimfront.trainables.models.base import MODELS, Model


@MODELS.register("mlp")
class MLP(Model):
    """`depth` hidden layers of `width` units with ReLU, then a linear output layer."""

    name: Literal["mlp"] = "mlp"
    depth: int = Field(4, ge=1, le=1000)
    width: int = Field(64, ge=1, le=1_000_000)

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        sizes = [math.prod(input_shape), *[self.width] * self.depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
