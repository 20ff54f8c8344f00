"""Weights as they were before a sparsifier was attached, for a training that goes on."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimfront.trainables.torch_internals import writes_to


class AsGiven:
    """The weights of a network, and what its optimiser remembers of them, from before a sparsifier
    is attached, which may drop some at once.

    A checkpoint may be loaded before that or after it. What was loaded before is what the training
    goes on from, and not what a fresh mask has left of it.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, *, drops: bool
    ) -> None:
        """Keeps nothing where nothing `drops` weights."""
        self._before = []
        for tensor in _tensors(network, optimizer) if drops else ():
            values = tensor.detach().clone()
            self._before.append((tensor, values, writes_to(tensor)))
        self._changed: list[tuple[Tensor, Tensor, int]] = []

    def attached(self) -> None:
        """Forgets all that the sparsifier has left as it was."""
        for tensor, values, writes in self._before:
            now = writes_to(tensor)
            if now != writes:
                self._changed.append((tensor, values, now))
        self._before = []

    @torch.no_grad()
    def restore(self) -> None:
        """Takes back what the sparsifier changed, but for what was written to since."""
        for tensor, values, writes in self._changed:
            if writes_to(tensor) == writes:
                tensor.copy_(values)
        self.forget()

    def forget(self) -> None:
        """Lets go of what was kept."""
        self._changed = []


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from network.parameters()
    for remembered in getattr(optimizer, "state", {}).values():
        if not isinstance(remembered, dict):
            continue
        for value in remembered.values():
            if isinstance(value, Tensor):
                yield value
