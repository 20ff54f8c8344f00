"""One-shot pruning of a finished network: further, smaller candidates that cost no training."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.options import Options
from slimfront.trainables.structure.agreement import pieces
from slimfront.trainables.structure.copying import copied

Scores = dict[str, Tensor]
"""What each weight is worth, in the shape of the weight, by the name of its layer."""
_SCORED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OneShot(Options):
    """Makes up to `steps` further candidates of a compact network, each with the share `keep` of
    the weights of the one before.

    0 steps: none. They end early once the quality is less than half of what it was, or the error
    more than twice that. One more lies between the last one that is within `tolerance` of the
    network they are made of and the first that is not: the smallest as good that `refine` halvings
    of what is between find. At the end of training, each is refitted for `recover` epochs, at the
    learning rate `refit.lr`.
    """

    steps: int = Field(8, ge=0)
    keep: float = Field(0.7, gt=0, lt=1)
    refine: int = Field(3, ge=0)
    recover: int = Field(0, ge=0)


class Pruning:
    """A copy of a network with fewer weights, without training; biases are kept.

    The weights with the smallest scores in the whole network are set to exactly 0. A weight's score
    is its magnitude times the norm of the inputs that it sees, |w| · ‖x‖₂ (Wanda: Sun et al. 2024,
    arXiv 2306.11695, eq. 1), for a convolution that of its input channel. The paper compares within
    each row; here, where rows and layers may go whole, all weights are compared.
    """

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        """`network` is in evaluation mode; `inputs` (N, *input_shape) are training inputs that the
        norms are taken on."""
        scores = weight_scores(network, inputs)
        self.scores = scores
        self.ordered = torch.zeros(0)
        if scores:
            self.ordered = _largest_first(scores.values())
        alive = self.ordered > 0
        self.alive = int(alive.sum())
        """How many weights are not zero."""
        modules = network.named_modules()
        self.whole = dict(modules)
        self.sparser = copied(network)

    def levels(self, options: OneShot) -> list[int]:
        """How many weights each step keeps; it ends where there is nothing more to drop."""
        found: list[int] = []
        kept = self.alive
        for step in range(1, options.steps + 1):
            share = options.keep**step
            fewer = int(self.alive * share)
            if fewer < 1 or fewer == kept:
                break
            kept = fewer
            found.append(kept)
        return found

    @torch.no_grad()
    def at(self, kept: int) -> nn.Module:
        """The network with the `kept` weights of the largest scores, in evaluation mode: one and
        the same copy each time."""
        last = self.ordered[kept - 1]
        least = float(last)
        modules = dict(self.sparser.named_modules())
        for name, score in self.scores.items():
            whole = self.whole[name]
            sparser = modules[name]
            stays = score >= least
            weights = whole.weight * stays
            sparser.weight.copy_(weights)
        return self.sparser


def _largest_first(scores: Iterable[Tensor]) -> Tensor:
    """All scores in one row, float64, on the CPU."""
    rows = [score.flatten() for score in scores]
    together = torch.cat(rows)
    exact = together.double()
    # By numpy, which is ten times as fast: torch wants to know the places too.
    numbers = exact.cpu().numpy()
    ordered = np.sort(numbers)
    rising = torch.from_numpy(ordered)
    return rising.flip(0)


@torch.no_grad()
def weight_scores(network: nn.Module, inputs: Tensor) -> Scores:
    """|w| · ‖x‖₂ of every weight of linear and convolutional layers, by the layer's name, in the
    shape of the weight. `inputs` (N, *input_shape) are run a batch at a time."""
    layers = {}
    squares: dict[str, Tensor] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, _SCORED):
            layers[name] = module
            hook = _Summing(name, squares)
            handle = module.register_forward_pre_hook(hook)
            handles.append(handle)
    try:
        for batch in pieces(inputs, network):
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _score(layers[name], sums.sqrt()) for name, sums in squares.items()}


@dataclass(frozen=True)
class _Summing:
    """A hook that adds up, by the layer's name, the squares of what each input feature or channel
    of a layer sees."""

    name: str
    squares: dict[str, Tensor]

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen = arguments[0]
        if isinstance(layer, nn.Linear):
            width = seen.shape[-1]
            rows = seen.reshape(-1, width).t()
        else:
            rows = seen.transpose(0, 1).flatten(1)
        sums = rows.norm(dim=1).square()
        before = self.squares.get(self.name)
        self.squares[self.name] = sums if before is None else before + sums


def _score(layer: nn.Module, norms_of_inputs: Tensor) -> Tensor:
    """|w| times the norm of the input feature or channel that each weight reads."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    size = weight.abs()
    if isinstance(layer, nn.Linear):
        return size * norms_of_inputs
    groups: int = layer.groups  # type: ignore[assignment]
    # Weights are (out, in / groups, *kernel): the outputs of group g read the g-th part of the
    # input channels.
    norms = norms_of_inputs.view(groups, -1)
    outputs_of_group = len(size) // groups
    per_output = norms.repeat_interleave(outputs_of_group, dim=0)
    kernel_axes = size.ndim - 2
    kernel = [1] * kernel_axes
    broadcast = per_output.view(*per_output.shape, *kernel)
    return size * broadcast
