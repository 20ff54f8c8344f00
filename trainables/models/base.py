"""What every network's options offer."""

from pathlib import Path

from pydantic import field_validator
from torch import nn

from slimfront.trainables.options import Options, Registry

Shape = tuple[int, ...]
"""Of one input, without the batch: (features,) or (channels, height, width)."""


class Model(Options):
    """Options of a network, and its builder.

    `weights` is a file with the state dict of a trained network, which training starts from (see
    `weights.load_weights`); with `strict: false`, names that are not in both are left out.
    """

    name: str
    weights: str | None = None
    strict: bool = True

    @field_validator("weights")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        """Made absolute, if the file is there: the processes of a search work in folders of their
        own."""
        if path is None:
            return None
        if "\0" in path:
            return path
        local = Path(path).expanduser()
        if not local.is_file():
            return path
        return str(local.absolute())

    def build(self, input_shape: Shape, outputs: int) -> nn.Module:
        """A freshly initialised network.

        Args:
            input_shape: shape of one input.
            outputs: number of outputs (logits).
        """
        raise NotImplementedError(f"the model '{self.name}' does not say how it is built")


MODELS: Registry[Model] = Registry("model")
