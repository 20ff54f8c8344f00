"""What every penalty offers to the training loop."""

from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables.options import Options, Registry


class ActivePenalty(Protocol):
    """A penalty at work on one network."""

    def before_batch(self, step: int) -> None:
        """Called before the forward pass of training step `step` (from 0)."""

    def loss(self) -> Tensor | None:
        """Called after the forward pass: a scalar to add to the task loss, or None."""

    def proximal(self, step_size: float) -> None:
        """Called after the optimiser's step of size `step_size` (the learning rate): the exact step of the penalty."""

    def close(self) -> None:
        """Takes away whatever was attached to the network."""


class Penalty(Options):
    """Options of a penalty. `strength` is its factor (λ or β); 0 switches it off."""

    strength: float = Field(0.0, ge=0)

    def attach(self, model: nn.Module, sample: Tensor) -> ActivePenalty:
        """The penalty on `model`; `sample` (N, *input_shape) is a batch of real inputs to look at shapes with."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is attached")

    def tensor(self, like: Tensor) -> Tensor:
        """The strength as a scalar tensor of the type and device of `like`."""
        return torch.as_tensor(self.strength, dtype=like.dtype, device=like.device)


PENALTIES: Registry[Penalty] = Registry("penalty")
