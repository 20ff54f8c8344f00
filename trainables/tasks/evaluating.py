"""Networks that are in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within, a network is in evaluation mode; afterwards each of its modules is in the mode that
    it was in.

    Not by `network.train(mode)`, which sets all modules: who freezes batch norms has some in
    evaluation mode while the others train.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
