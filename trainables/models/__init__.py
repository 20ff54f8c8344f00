"""Networks by name. A new one is one file here with a class under `@MODELS.register`."""

from slimfront.trainables.models.adapted import adapted, built
from slimfront.trainables.models.base import MODELS, Model
from slimfront.trainables.models.factory import Factory
from slimfront.trainables.models.lenet import LeNet
from slimfront.trainables.models.mlp import MLP
from slimfront.trainables.models.resnet import CifarResNet, ResNet18
from slimfront.trainables.models.vgg import VGG

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "CifarResNet",
    "Factory",
    "LeNet",
    "Model",
    "ResNet18",
    "adapted",
    "built",
]
