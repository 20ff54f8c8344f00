"""What is left of a network is fitted to what the whole network computed, layer by layer.

In the order in which they are computed, each linear and convolutional layer gets the weights with
which it gives, of what it sees now, what the same layer of the whole network gave: a regression by
least squares, with a ridge towards the weights that it has (He, Zhang & Sun 2017, Channel pruning
for accelerating very deep neural networks, arXiv 1707.06168, eq. 5, where it follows each choice of
channels; here all that was chosen is made up for at once, errors of the layers before included, as
in its section 3.2). It needs no targets and no gradients, and one pass through both networks.
Networks may change what they are given in place, so that each run has a copy of the inputs.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.inputs import joined, tensors
from slimfront.trainables.reconstruction.layers import (
    Matrix,
    axis_of_outputs,
    can_be_fitted,
    matrix_of,
    rows_of,
    rows_of_each,
    set_matrix,
)
from slimfront.trainables.reconstruction.least_squares import fitted
from slimfront.trainables.reconstruction.side_by_side import outputs_of
from slimfront.trainables.tasks.evaluating import evaluating

_ROWS_FOR_EACH, _LEAST, _MOST = 2, 128, 512
"""Each layer needs so many rows for each of its inputs; from and to so many examples are looked
at."""
_ENTRIES = 2**26
"""What a layer may give for all examples: of larger networks fewer examples are looked at."""


@torch.no_grad()
def reconstruct(
    whole: nn.Module,
    smaller: nn.Module,
    batches: Sequence[Tensor],
    stay: Collection[str] = (),
) -> list[str]:
    """Fits the layers of `smaller`, in place, to what those of the same names give in `whole`, in
    evaluation mode. Weights that are 0 stay 0.

    Layers that are called several times, share their weight, or compute it, stay as they are.

    Args:
        batches: inputs (N, …) of both; those of other sizes than the first are left out.
        stay: names of parameters; layers that have one of these stay as they are.

    Returns:
        The names of the layers that were fitted.
    """
    names = _called_once(smaller, batches[0]) & _called_once(whole, batches[0])
    inputs = _looked_at(smaller, batches)
    names -= {parameter.rpartition(".")[0] for parameter in stay}
    with (
        evaluating(whole),
        evaluating(smaller),
        outputs_of(whole, inputs.clone(), names) as outputs,
    ):
        fit = _Fit(outputs.of)
        with _hooked(smaller, names, fit.hook):
            smaller(inputs.clone())
    return fit.done


class Reconstruction:
    """Fits copies of one network in which weights were set to 0, one after another: what its layers
    give is computed once, and kept.

    `names` are those of the layers that it fits.
    """

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        """
        Args:
            network: in evaluation mode; it may change then.
            inputs: (N, …), of which no more are looked at than what layers give can be kept of, and
                no more than each layer needs.
        """
        self.names = _called_once(network, inputs)
        kept: dict[str, Tensor] = {}
        rows: list[float] = []

        def keep(name: str) -> Hook:
            def hook(layer: nn.Module, _given: Any, made: Tensor) -> None:
                kept[name] = made.clone()
                rows.append(rows_of_each(layer, made))

            return hook

        with torch.no_grad():
            with _hooked(network, self.names, keep):
                network(inputs[:2].clone())
            entries = sum(made.numel() for made in kept.values()) // len(inputs[:2])
            fitting = max(_ENTRIES // max(entries, 1), 1)
            needed = math.ceil(_ROWS_FOR_EACH / min(rows, default=1.0))
            self.inputs = inputs[: min(fitting, max(needed, _LEAST), _MOST)]
            with _hooked(network, self.names, keep):
                network(self.inputs.clone())
        self.kept = kept

    @torch.no_grad()
    def apply(self, network: nn.Module) -> None:
        """Fits a copy of the network, in evaluation mode, in place."""
        fit = _Fit(self.kept.get)
        with _hooked(network, self.names, fit.hook):
            network(self.inputs.clone())


Hook = Callable[[nn.Module, Any, Any], Tensor | None]


class _Fit:
    """Fits each layer when it is called, to what `wanted` gives by its name."""

    def __init__(self, wanted: Callable[[str], Tensor | None]) -> None:
        self.wanted = wanted
        self.done: list[str] = []

    def hook(self, name: str) -> Hook:
        """Called after a layer: what it gives with its new weights."""

        def hook(layer: nn.Module, given: Any, made: Tensor) -> Tensor | None:
            wanted = self.wanted(name)
            if wanted is None or wanted.shape != made.shape or _is_right(layer, made, wanted):
                return None
            _fit(layer, given[0], wanted)
            self.done.append(name)
            again: Tensor = layer.forward(*given)
            return again

        return hook


@contextmanager
def _hooked(
    network: nn.Module, names: Collection[str], hook_of: Callable[[str], Hook]
) -> Iterator[None]:
    """Within, each of these layers calls a hook after it was called."""
    handles = []
    for name, module in network.named_modules():
        if name in names:
            handles.append(module.register_forward_hook(hook_of(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_right(layer: nn.Module, made: Tensor, wanted: Tensor) -> bool:
    """Whether a layer gives what is wanted, but for outputs that have no weights."""
    has_weights = (matrix_of(layer).weight != 0).any(-1).flatten()
    axis = axis_of_outputs(layer)
    places = has_weights.nonzero().flatten()
    return torch.equal(made.index_select(axis, places), wanted.index_select(axis, places))


def _fit(layer: nn.Module, x: Tensor, wanted: Tensor) -> None:
    matrix = matrix_of(layer)
    x, y = rows_of(layer, x, wanted)
    weight = matrix.weight
    free = weight != 0
    if matrix.bias is not None:
        alive = free.any(-1, keepdim=True)
        weight = torch.cat([weight, matrix.bias.unsqueeze(-1)], dim=-1)
        free = torch.cat([free, alive], dim=-1)
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    found = fitted(x, y, weight, free)
    if not found.isfinite().all():
        return
    if matrix.bias is None:
        set_matrix(layer, Matrix(found, None))
    else:
        set_matrix(layer, Matrix(found[..., :-1], found[..., -1]))


def _called_once(network: nn.Module, batch: Tensor) -> set[str]:
    """The layers that can be fitted and are called once, with one tensor, in a forward pass."""
    shared = Counter(
        id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False)
    )
    calls: Counter[str] = Counter()

    def listen(name: str) -> Hook:
        def hook(layer: nn.Module, given: Any, made: Any) -> None:
            is_plain = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(made, Tensor)
            calls[name] += 1 if is_plain and _is_matrix(layer, given[0], made) else 2

        return hook

    names = []
    for name, module in network.named_modules():
        if can_be_fitted(module) and shared[id(module.weight)] == 1:
            names.append(name)
    with torch.no_grad(), evaluating(network), _hooked(network, names, listen):
        network(batch[:2].clone())
    return {name for name, count in calls.items() if count == 1}


def _is_matrix(layer: nn.Module, x: Tensor, made: Tensor) -> bool:
    """Whether a layer computes what its matrix says: one of a library's own may not."""
    matrix = matrix_of(layer)
    x, y = rows_of(layer, x, made)
    if (y.shape[-1], x.shape[-1]) != matrix.weight.shape[1:]:
        return False
    computed = x @ matrix.weight.mT
    if matrix.bias is not None:
        computed = computed + matrix.bias.unsqueeze(1)
    return torch.allclose(computed, y, rtol=1e-3, atol=1e-4)


def _looked_at(network: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """As many examples as fit, of the size of the first."""
    first = batches[0]
    few = first[:2]
    largest = 1

    def look(_name: str) -> Hook:
        def hook(_layer: nn.Module, _given: Any, made: Any) -> None:
            nonlocal largest
            if isinstance(made, Tensor):
                largest = max(largest, made.numel() // len(few))

        return hook

    names = [name for name, _ in network.named_modules()]
    with evaluating(network), _hooked(network, names, look):
        network(few.clone())
    most = max(_ENTRIES // largest, 1)
    found = first
    for batch in batches[1:]:
        if _shapes(batch) == _shapes(first) and len(found) < most:
            found = joined(found, batch)
    return found[:most]


def _shapes(batch: Tensor) -> list[tuple[int, ...]]:
    """Of one example of each input."""
    return [tuple(tensor.shape[1:]) for tensor in tensors(batch).values()]
