"""A network of the user's, by import path."""

import copy
from typing import Literal

from pydantic import Field, JsonValue
from torch import nn

from slimfront.trainables.errors import OF_USERS_CODE, UserError
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.models.base import MODELS, Model


@MODELS.register("factory")
class Factory(Model):
    """What the callable at the import path `factory` (`package.module:function`) returns for the
    keyword arguments `args`.

    It must return an `nn.Module` that takes the data set's inputs (N, *input_shape) and gives
    logits (N, outputs).
    """

    name: Literal["factory"] = "factory"
    factory: str
    args: dict[str, JsonValue] = Field(default_factory=dict)

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        function = import_by_path(self.factory, "model factory")
        try:
            network = function(**copy.deepcopy(self.args))
        except OF_USERS_CODE as error:
            raise UserError(
                f"model factory '{self.factory}' raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(network, nn.Module):
            raise UserError(
                f"model factory '{self.factory}' returned a {type(network).__name__}; it must be a "
                "torch.nn.Module"
            )
        return network
