"""Whether two networks compute the same: their structure, shapes and types first, then each output
against its own spread.

A right removal changes nothing but the order of sums: in float64 its outputs agree to `EXACT`,
while those of a wrong one do not, however small a later layer makes its mistake. That is why
networks are compared in float64, where they can be.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.inputs import each, tensors
from slimfront.trainables.torch_internals import flattened

EXACT = 1e-10
"""How far outputs in float64 may be apart, relative to their spread, where only sums were taken in
another order."""

_ROUNDING = 256
"""Differences of so many machine epsilons of the largest output are rounding, whatever the spread
of the one that differs."""

_REAL, _FRESH = 16, 8
"""How many real inputs are looked at in float64, and how many are drawn of each kind of fresh
ones."""

Outputs = Any
"""What a network returns: a tensor, or tuples, lists and mappings of tensors."""


class Probe:
    """Inputs, and what a network makes of them: other networks are compared with it.

    Beside real inputs there are fresh ones, drawn by a fixed seed, and batches of one and of three:
    a size of batch or a range of values that was written into a network by mistake shows there.
    """

    def __init__(self, expected: nn.Module, inputs: Tensor, *, fresh: bool = True) -> None:
        """`expected` is run at once, and may change afterwards; `inputs` (N, *input_shape) are real
        ones, of the network's type.

        With `fresh`, a few of the real inputs are looked at and others are drawn; without, all of
        the real ones and no others. Fresh inputs that `expected` raises an error on (numbers that
        are no index, say) are left out.
        """
        self._batches: list[tuple[Tensor, Outputs]] = []
        for number, batch in enumerate(_batches(inputs[:_REAL] if fresh else inputs, fresh)):
            try:
                self._batches.append((batch, outputs(expected, batch)))
            except (RuntimeError, ValueError, IndexError, AssertionError):
                if number == 0:
                    raise

    def difference(self, actual: nn.Module, tolerance: float) -> float:
        """The largest difference of an output, as `difference` gives it; infinite where `actual`
        raises an error."""
        reference = self._batches[0][1]
        worst = 0.0
        for number, (batch, wanted) in enumerate(self._batches):
            try:
                got = outputs(actual, batch)
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return float("inf")
            found = difference(
                wanted,
                got,
                tolerance,
                reference if len(batch) < _FRESH else wanted,
                both_nan=number > 0,
            )
            if not found <= worst:  # NaN too, which stays
                worst = found
            if math.isnan(worst):
                break
        return worst

    def is_of_numbers(self) -> bool:
        """Whether no output for the real inputs is NaN."""
        leaves, _ = flattened(self._batches[0][1])
        return not any(bool(leaf.isnan().any()) for leaf in leaves if isinstance(leaf, Tensor))

    def agrees(self, actual: nn.Module, tolerance: float = EXACT) -> bool:
        """Whether no output differs by more than `tolerance`."""
        return self.difference(actual, tolerance) <= tolerance


@torch.no_grad()
def outputs(network: nn.Module, inputs: Tensor) -> Outputs:
    """What a network returns in evaluation mode; what it draws at random there, it draws alike in
    every call."""
    gpus = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all GPUs
        if gpus:
            torch.cuda.manual_seed(0)
        # A traced network that is called, and not its forward, prints a traceback of its own for
        # what it raises.
        return network.forward(inputs) if isinstance(network, fx.GraphModule) else network(inputs)


def difference(
    wanted: Outputs,
    got: Outputs,
    tolerance: float,
    spread_of: Outputs | None = None,
    *,
    both_nan: bool = False,
) -> float:
    """The largest difference between an element of two outputs, relative to that element's own
    spread over the inputs.

    Args:
        wanted: outputs of one network, the first axis of a tensor being the inputs.
        got: those of another network.
        tolerance: what the result is compared with; rounding, which grows with the largest element,
            counts below it.
        spread_of: outputs of more inputs whose spread counts; those of `wanted` if None, or where
            shapes do not fit.
        both_nan: whether two elements that are NaN count as equal.

    Returns:
        NaN where an element is NaN; infinity where structure, shapes, types, or numbers that are no
        floats differ.
    """
    leaves, structure = flattened(wanted)
    others, other_structure = flattened(got)
    wider, wider_structure = flattened(wanted if spread_of is None else spread_of)
    if structure != other_structure:
        return float("inf")
    if wider_structure != structure:
        wider = leaves
    found = [
        _of_leaf(*each, tolerance, both_nan) for each in zip(leaves, others, wider, strict=True)
    ]
    return next(filter(math.isnan, found), max(found, default=0.0))


def _of_leaf(wanted: Any, got: Any, wider: Any, tolerance: float, both_nan: bool) -> float:
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(wanted) is type(got) and wanted == got else float("inf")
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else float("inf")
    if wanted.numel() == 0:
        return 0.0
    fits = (
        isinstance(wider, Tensor)
        and wider.shape[1:] == wanted.shape[1:]
        and wider.dim() == wanted.dim()
    )
    eps = torch.finfo(wanted.dtype).eps
    wanted, got = wanted.double(), got.double()
    wider = wider.double() if fits else wanted
    largest = torch.where(wider.isfinite(), wider, 0).abs().max()
    scale = _spread(wider) + largest * (_ROUNDING * eps / tolerance)
    equal = wanted == got  # infinities too
    if both_nan:
        equal |= wanted.isnan() & got.isnan()
    apart = torch.where(equal, 0, (got - wanted).abs())
    return float((apart / scale.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _spread(values: Tensor) -> Tensor:
    """The difference of the largest and smallest finite value over the first axis: (N, …) to (1,
    …)."""
    finite = values.isfinite()
    if values.dim() == 0:
        return torch.zeros_like(values)
    high = torch.where(finite, values, -torch.inf).amax(0, keepdim=True)
    low = torch.where(finite, values, torch.inf).amin(0, keepdim=True)
    return (high - low).clamp_min(0)


def _batches(real: Tensor, fresh: bool) -> Iterator[Tensor]:
    """Real inputs, three and one of them where there are more; then fresh ones: real values in new
    combinations, and normal ones."""
    yield real
    yield from (real[-count:] for count in (3, 1) if count < len(real))
    if not fresh:
        return
    generator = torch.Generator().manual_seed(0)
    yield each(real, partial(_recombined, generator))
    # Whole numbers may be indices.
    if any(_has_fractions(tensor) for tensor in tensors(real).values()):
        yield each(real, partial(_normal, generator))


def _recombined(generator: torch.Generator, real: Tensor) -> Tensor:
    """Real values (N, …) in new combinations, (_FRESH, …)."""
    features = real.reshape(len(real), -1)
    shape = (_FRESH, features.shape[1])
    drawn = torch.randint(len(real), shape, generator=generator).to(real.device)
    return features.gather(0, drawn).reshape(_FRESH, *real.shape[1:])


def _has_fractions(real: Tensor) -> bool:
    return real.is_floating_point() and not bool((real == real.round()).all())


def _normal(generator: torch.Generator, real: Tensor) -> Tensor:
    """Normal values of the mean and deviation of the real ones (N, …), (_FRESH + 1, …); whole
    numbers of them in their order."""
    if not _has_fractions(real):
        places = torch.arange(_FRESH + 1, device=real.device) % len(real)
        return real[places]
    scale = real.std() if real.numel() > 1 else real.abs().max()
    normal = torch.randn(_FRESH + 1, *real.shape[1:], generator=generator, dtype=torch.float64)
    return normal.to(real) * scale + real.mean()
