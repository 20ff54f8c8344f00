"""One-shot pruning of a finished network: further, smaller candidates that cost no training."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.options import Options
from slimfront.trainables.reconstruction import Reconstruction
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.structure.agreement import pieces
from slimfront.trainables.structure.copying import copied

Scores = dict[str, Tensor]
"""What each weight is worth, in the shape of the weight, by the name of its parameter."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SEEING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
"""Layers that read each feature or channel of one input by weights of its own."""


class OneShot(Options):
    """Makes up to `steps` further candidates of a compact network, each with the share `keep` of
    the weights of the one before.

    0 steps: none. They end early once the quality is less than half of what it was, or the error
    more than twice that. One more lies between the last one that is within `tolerance` of the
    network they are made of and the first that is not: the smallest as good that `refine` halvings
    of what is between find. With `correct`, each layer is fitted to what it gave, by least squares:
    see `reconstruction`. At the end of training, each is refitted for `recover` epochs, at the
    learning rate `refit.lr`.
    """

    steps: int = Field(8, ge=0)
    keep: float = Field(0.7, gt=0, lt=1)
    refine: int = Field(3, ge=0)
    correct: bool = True
    recover: int = Field(0, ge=0)


class Pruning:
    """A copy of a network with fewer weights, without training.

    The weights with the smallest scores in the whole network are set to exactly 0. A weight's score
    is its magnitude times the norm of the inputs that it sees, |w| · ‖x‖₂ (Wanda: Sun et al. 2024,
    arXiv 2306.11695, eq. 1), for a convolution that of its input channel; in recurrent and bilinear
    layers it is its magnitude alone. The paper compares within each row; here all weights are
    compared, by what their scores are within their layers: see `layer_adaptive`.

    What is left is kept as it is, or fitted to what its layers gave: see `Reconstruction`.
    """

    def __init__(self, network: nn.Module, inputs: Tensor, *, correct: bool = False) -> None:
        """`network` is in evaluation mode; `inputs` (N, *input_shape) are training inputs that the
        norms are taken on."""
        scores = layer_adaptive(weight_scores(network, inputs))
        self.scores = scores
        self.ordered = torch.zeros(0)
        if scores:
            self.ordered = _largest_first(scores.values())
        alive = self.ordered > 0
        self.alive = int(alive.sum())
        """How many weights are not zero."""
        self.whole = network
        self.sparser = copied(network)
        self.correction: Reconstruction | None = None
        if correct and scores:
            self.correction = Reconstruction(network, inputs)

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
    def at(self, kept: int, *, corrected: bool = True) -> nn.Module:
        """The network with the `kept` weights of the largest scores, in evaluation mode: one and
        the same copy each time. Without being `corrected` it has the same zeros."""
        last = self.ordered[kept - 1]
        least = float(last)
        for name, score in self.scores.items():
            stays = score >= least
            weights = self.whole.get_parameter(name) * stays
            self.sparser.get_parameter(name).copy_(weights)
        if self.correction is not None:
            for name in self.correction.names:
                for leaf, given in self.whole.get_submodule(name).named_parameters(recurse=False):
                    parameter = _parameter_of(name, leaf)
                    if parameter not in self.scores:
                        self.sparser.get_parameter(parameter).copy_(given)
            if corrected:
                self.correction.apply(self.sparser)
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


def layer_adaptive(scores: Scores) -> Scores:
    """Scores that can be compared between layers, float64: the square of each, over the sum of the
    squares of those in its layer that are as large or larger (LAMP: Lee et al. 2021, arXiv
    2010.07611, eq. 4, there of weights; ties in any order).

    Inputs of layers differ in size, and their number: compared as they are, the last layer of a
    convolutional network would go first, and whole.
    """
    found = {}
    for name, score in scores.items():
        squares = score.double().square().flatten()
        order = squares.argsort(stable=True)
        rising = squares[order]
        as_large = rising.flip(0).cumsum(0).flip(0)
        relative = torch.where(as_large > 0, rising / as_large, 0.0)
        placed = torch.empty_like(relative)
        placed[order] = relative
        found[name] = placed.view_as(score)
    return found


@torch.no_grad()
def weight_scores(network: nn.Module, inputs: Tensor) -> Scores:
    """|w| · ‖x‖₂ of every weight that may be dropped, by the name of its parameter, in its shape;
    |w| in recurrent and bilinear layers, and in those that are not run. `inputs` (N, *input_shape)
    are run a batch at a time."""
    layers = {}
    squares: dict[str, Tensor] = {}
    handles = []
    weights = prunable_weights(network)
    names = {id(weight): name for name, weight in weights.items()}
    for module in network.modules():
        if isinstance(module, _SEEING) and id(module.weight) in names:
            name = names[id(module.weight)]
            layers[name] = module
            hook = _Summing(name, squares)
            handle = module.register_forward_pre_hook(hook)
            handles.append(handle)
    try:
        for batch in pieces(inputs, network):
            network(batch.clone())
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for name, weight in weights.items():
        scores[name] = weight.detach().abs()
        if name in squares:
            scores[name] = _score(layers[name], squares[name].sqrt())
    return scores


def _parameter_of(layer: str, leaf: str) -> str:
    """The name of a layer's parameter, for a network that is the layer itself too."""
    return f"{layer}.{leaf}" if layer else leaf


@dataclass(frozen=True)
class _Summing:
    """A hook that adds up, by the name of its weight, the squares of what each input feature or
    channel of a layer sees."""

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
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, *kernel)
        return size * norms_of_inputs.reshape(-1, *[1] * (size.ndim - 1))
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
