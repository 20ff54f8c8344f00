"""Networks by name. A new one is one file here with a class under `@MODELS.register`."""

from trainables.models.base import MODELS, Model
from trainables.models.mlp import MLP

__all__ = ["MLP", "MODELS", "Model"]
