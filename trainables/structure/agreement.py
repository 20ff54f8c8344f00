"""Whether two networks compute the same: their structure, shapes and types first, then each output
against its own spread.

A right removal changes nothing but the order of sums: in float64 its outputs agree to `EXACT`,
while those of a wrong one do not, however small a later layer makes its mistake. That is why
networks are compared in float64, where they can be.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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

SEEN = 16
"""So many real inputs are looked at in float64, at most."""
_REAL, _FRESH = SEEN, 8
"""How many real inputs are looked at in float64, and how many are drawn of each kind of fresh
ones."""
_REAL_LARGE, _FRESH_LARGE = 8, 4
"""The same of inputs of over `_LARGE` entries, such as images: each shows more, and costs more."""
_LARGE = 2**14
_AT_ONCE, _ENTRIES_AT_ONCE = 256, 2**22
"""So many inputs are run at once at most, and so many entries of them."""
_FEW = 4
"""Outputs for fewer inputs than this say nothing of their spread."""

Outputs = Any
"""What a network returns: a tensor, or tuples, lists and mappings of tensors."""


class Probe:
    """Inputs, and what a network makes of them: other networks are compared with it.

    Beside real inputs there are fresh ones, drawn by a fixed seed, and batches of one and of three:
    a size of batch or a range of values that was written into a network by mistake shows there.
    """

    def __init__(
        self,
        expected: nn.Module,
        inputs: Tensor,
        *,
        fresh: bool = True,
        briefly: bool = False,
    ) -> None:
        """`expected` is run at once, and may change afterwards; `inputs` (N, *input_shape) are real
        ones, of the network's type.

        With `fresh`, a few of the real inputs are looked at and others are drawn; without, all of
        the real ones and no others. Fresh inputs that `expected` raises an error on (numbers that
        are no index, say) are left out. `briefly` leaves out the first batch, which is the largest,
        where there are others: for a step that is judged once more in the end.
        """
        self._batches: list[tuple[Tensor, Outputs]] = []
        real, drawn = _seen(inputs) if fresh else (len(inputs), 0)
        batches = list(_batches(inputs[:real], drawn))
        for number, batch in enumerate(batches[1:] if briefly and batches[1:] else batches):
            try:
                self._batches.append((batch, outputs(expected, batch)))
            except (RuntimeError, ValueError, IndexError, AssertionError):
                if number == 0:
                    raise

    def difference(self, actual: nn.Module, tolerance: float, *, briefly: bool = False) -> float:
        """The largest difference of an output, as `difference` gives it; infinite where `actual`
        raises an error. `briefly` leaves out the first batch, as when a probe is made."""
        enough = [made for batch, made in self._batches if len(batch) >= _FEW]
        reference = enough[0] if enough else self._batches[0][1]
        worst = 0.0
        few = briefly and len(self._batches) > 1
        for number, (batch, wanted) in enumerate(self._batches):
            if few and number == 0:
                continue
            try:
                got = outputs(actual, batch)
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return float("inf")
            found = difference(
                wanted,
                got,
                tolerance,
                reference if len(batch) < _FEW else wanted,
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

    def agrees(self, actual: nn.Module, tolerance: float = EXACT, *, briefly: bool = False) -> bool:
        """Whether no output differs by more than `tolerance`; `briefly` as in `difference`."""
        return self.difference(actual, tolerance, briefly=briefly) <= tolerance


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


def difference_in_batches(
    expected: nn.Module, actual: nn.Module, inputs: Tensor, tolerance: float
) -> float:
    """The largest difference of two networks' outputs on all of `inputs` (N, *input_shape), and on
    the last three and one of them, as `difference` gives it; infinite where `actual` raises an
    error.

    A batch is run at a time, so that memory does not grow with N.
    """
    found: dict[tuple[int, torch.Size], _Compared] = {}
    for batch in (*pieces(inputs), *(inputs[-n:] for n in (3, 1) if n < len(inputs))):
        wanted = outputs(expected, batch)
        try:
            got = outputs(actual, batch)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return float("inf")
        leaves, structure = flattened(wanted)
        others, other_structure = flattened(got)
        if structure != other_structure:
            return float("inf")
        for number, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
            compared = _compared(leaf, other, leaf, both_nan=False)
            if isinstance(compared, float):
                if compared > 0:
                    return compared
                continue
            key = number, compared.apart.shape
            found[key] = compared if key not in found else found[key].joined(compared)
    each_of = [compared.relative(tolerance) for compared in found.values()]
    return next(filter(math.isnan, each_of), max(each_of, default=0.0))


def pieces(inputs: Tensor) -> Iterator[Tensor]:
    """Inputs (N, *input_shape) a batch at a time: few enough that they fit a device's memory."""
    entries = max(_entries(inputs), 1)
    size = max(1, min(_AT_ONCE, _ENTRIES_AT_ONCE // entries))
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def _entries(inputs: Tensor) -> int:
    """How many entries one input has."""
    return sum(tensor[:1].numel() for tensor in tensors(inputs).values())


@dataclass(frozen=True)
class _Compared:
    """One tensor of two networks' outputs: how far they are `apart` at most, and the highest and
    lowest finite values, of each element over the inputs (1, …); the largest magnitude of all."""

    apart: Tensor
    high: Tensor
    low: Tensor
    largest: Tensor
    eps: float

    def joined(self, other: "_Compared") -> "_Compared":
        """The same over the inputs of both."""
        return _Compared(
            torch.maximum(self.apart, other.apart),
            torch.maximum(self.high, other.high),
            torch.minimum(self.low, other.low),
            torch.maximum(self.largest, other.largest),
            self.eps,
        )

    def relative(self, tolerance: float) -> float:
        """The largest difference, relative to the element's spread."""
        spread = (self.high - self.low).clamp_min(0)
        scale = spread + self.largest * (_ROUNDING * self.eps / tolerance)
        return float((self.apart / scale.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _of_leaf(wanted: Any, got: Any, wider: Any, tolerance: float, both_nan: bool) -> float:
    compared = _compared(wanted, got, wider, both_nan=both_nan)
    return compared if isinstance(compared, float) else compared.relative(tolerance)


def _by_kind(wanted: Any, got: Any) -> float | None:
    """0 or infinity where two outputs are not both tensors of some numbers; None where they are, of
    the same shape and type."""
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(wanted) is type(got) and wanted == got else float("inf")
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else float("inf")
    return None if wanted.numel() else 0.0


def _compared(wanted: Any, got: Any, wider: Any, *, both_nan: bool) -> "_Compared | float":
    """Two outputs compared, the spread being that of `wider`; 0 or infinity where that takes no
    numbers."""
    by_kind = _by_kind(wanted, got)
    if by_kind is not None:
        return by_kind
    fits = (
        isinstance(wider, Tensor)
        and wider.shape[1:] == wanted.shape[1:]
        and wider.dim() == wanted.dim()
    )
    eps = torch.finfo(wanted.dtype).eps
    wanted, got = wanted.double(), got.double()
    wider = wider.double() if fits else wanted
    equal = wanted == got  # infinities too
    if both_nan:
        equal |= wanted.isnan() & got.isnan()
    apart = torch.where(equal, 0, (got - wanted).abs())
    finite = wider.isfinite()
    largest = torch.where(finite, wider, 0).abs().max()
    if wider.dim() == 0:
        return _Compared(apart, torch.zeros_like(apart), torch.zeros_like(apart), largest, eps)
    high = torch.where(finite, wider, -torch.inf).amax(0, keepdim=True)
    low = torch.where(finite, wider, torch.inf).amin(0, keepdim=True)
    return _Compared(apart.amax(0, keepdim=True), high, low, largest, eps)


def _seen(inputs: Tensor) -> tuple[int, int]:
    """How many real inputs are looked at, and how many are drawn of each kind."""
    return (_REAL_LARGE, _FRESH_LARGE) if _entries(inputs) > _LARGE else (_REAL, _FRESH)


def _batches(real: Tensor, drawn: int) -> Iterator[Tensor]:
    """Real inputs, three (if they are not large) and one of them where there are more; then as many
    fresh ones as are to be drawn: real values in new combinations, and normal ones."""
    yield real
    small = (1,) if drawn == _FRESH_LARGE else (3, 1)
    yield from (real[-count:] for count in small if count < len(real))
    if not drawn:
        return
    generator = torch.Generator().manual_seed(0)
    yield each(real, partial(_recombined, generator, drawn))
    # Whole numbers may be indices.
    if any(_has_fractions(tensor) for tensor in tensors(real).values()):
        yield each(real, partial(_normal, generator, drawn + 1))


def _recombined(generator: torch.Generator, count: int, real: Tensor) -> Tensor:
    """Real values (N, …) in new combinations, (count, …)."""
    features = real.reshape(len(real), -1)
    shape = (count, features.shape[1])
    drawn = torch.randint(len(real), shape, generator=generator).to(real.device)
    return features.gather(0, drawn).reshape(count, *real.shape[1:])


def _has_fractions(real: Tensor) -> bool:
    return real.is_floating_point() and not bool((real == real.round()).all())


def _normal(generator: torch.Generator, count: int, real: Tensor) -> Tensor:
    """Normal values of the mean and deviation of the real ones (N, …), (count, …); whole
    numbers of them in their order."""
    if not _has_fractions(real):
        places = torch.arange(count, device=real.device) % len(real)
        return real[places]
    scale = real.std() if real.numel() > 1 else real.abs().max()
    normal = torch.randn(count, *real.shape[1:], generator=generator, dtype=torch.float64)
    return normal.to(real) * scale + real.mean()
