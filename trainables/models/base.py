"""What every network's options offer."""

from torch import nn

from slimfront.trainables.options import Options, Registry


class Model(Options):
    """Options of a network, and its builder."""

    name: str

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """A freshly initialised network.

        Args:
            input_shape: shape of one input, without the batch: (features,) or (channels, height,
                width).
            outputs: number of outputs (logits).
        """
        raise NotImplementedError(f"the model '{self.name}' does not say how it is built")


MODELS: Registry[Model] = Registry("model")
