"""What every sparsifier offers to the training loop."""

from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables.options import Options, Registry


class ActiveSparsifier(Protocol):
    """A sparsifier at work on one network. Its masks are True where a weight may be non-zero."""

    def before_step(self) -> None:
        """Called between the backward pass and the optimiser's step."""

    def after_step(self, step: int) -> None:
        """Called after training step `step` (from 0): updates the masks when due, and zeroes what they drop."""

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by parameter name."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the masks bit-exactly."""


class Sparsifier(Options):
    """Options of a sparsifier. `sparsity` is the target share of exactly zero weights (biases are never dropped)."""

    name: str
    sparsity: float = Field(0.0, ge=0, lt=1)

    def attach(self, model: nn.Module, total_steps: int) -> ActiveSparsifier:
        """The sparsifier on `model`, which will train for `total_steps` optimiser steps."""
        raise NotImplementedError(f"the sparsifier '{self.name}' does not say how it is attached")


SPARSIFIERS: Registry[Sparsifier] = Registry("sparsifier")


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a sparsifier may drop: those of linear and convolutional layers, by parameter name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


class Masks:
    """Boolean masks of the prunable weights of one network, and their application."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = prunable_weights(model)
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zeroes the gradients of dropped weights, so that no optimiser builds momentum for them."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Sets dropped weights to exactly 0."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the masks by parameter name."""
        return {name: mask.clone() for name, mask in self.masks.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores masks from `state_dict`."""
        for name, mask in self.masks.items():
            mask.copy_(state[name])
