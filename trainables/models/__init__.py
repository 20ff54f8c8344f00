"""Networks by name. A new one is one file here with a class under `@MODELS.register`."""

from trainables.models.base import MODELS, Model
from trainables.models.factory import Factory
from trainables.models.lenet import LeNet
from trainables.models.mlp import MLP
from trainables.models.resnet import CifarResNet, ResNet18
from trainables.models.vgg import VGG

__all__ = ["MLP", "MODELS", "VGG", "CifarResNet", "Factory", "LeNet", "Model", "ResNet18"]
