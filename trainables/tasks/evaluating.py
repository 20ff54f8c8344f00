"""Networks that are in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MOST_ENTRIES = 2**16
_FEWEST = 16


def fitting_caches(network: nn.Module, entries: int) -> int | None:
    """How many inputs, of so many `entries` each, a convolutional network on a CPU is given at once
    so that what it makes of them stays in a core's caches, which takes less time than many at once.
    None for other networks, and elsewhere."""
    is_convolutional = False
    for parameter in network.parameters():
        if parameter.device.type != "cpu":
            return None
        if parameter.dim() > 2:
            is_convolutional = True
    if not is_convolutional:
        return None
    return max(_MOST_ENTRIES // max(entries, 1), _FEWEST)


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
