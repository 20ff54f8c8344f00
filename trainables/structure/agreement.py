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

_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError)
"""What a network raises on inputs that it does not take."""

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
        if briefly and len(batches) > 1:
            batches = batches[1:]
        for number, batch in enumerate(batches):
            try:
                wanted = outputs(expected, batch)
            except _ERRORS:
                if number == 0:
                    raise
            else:
                self._batches.append((batch, wanted))

    def difference(self, actual: nn.Module, tolerance: float, *, briefly: bool = False) -> float:
        """The largest difference of an output, as `difference` gives it; infinite where `actual`
        raises an error. `briefly` leaves out the first batch, as when a probe is made."""
        reference = self._reference()
        worst = 0.0
        few = briefly and len(self._batches) > 1
        for number, (batch, wanted) in enumerate(self._batches):
            if few and number == 0:
                continue
            try:
                got = outputs(actual, batch)
            except _ERRORS:
                return float("inf")
            spread_of = reference if len(batch) < _FEW else wanted
            found = difference(wanted, got, tolerance, spread_of, both_nan=number > 0)
            if math.isnan(found):
                return found
            worst = max(worst, found)
        return worst

    def _reference(self) -> Outputs:
        """The outputs for the first batch that says something of their spread, or of the first."""
        for batch, wanted in self._batches:
            if len(batch) >= _FEW:
                return wanted
        _, wanted = self._batches[0]
        return wanted

    def is_of_numbers(self) -> bool:
        """Whether no output for the real inputs is NaN."""
        _, made = self._batches[0]
        leaves, _ = flattened(made)
        numbers = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return not any(bool(tensor.isnan().any()) for tensor in numbers)

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
        if isinstance(network, fx.GraphModule):
            # Called itself, and not its forward, it prints a traceback of its own for what it
            # raises.
            return network.forward(inputs)
        return network(inputs)


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
    found = []
    for leaf, other, wide in zip(leaves, others, wider, strict=True):
        compared = _compared(leaf, other, wide, both_nan=both_nan)
        found.append(_relative(compared, tolerance))
    return _largest(found)


def _largest(differences: list[float]) -> float:
    """The largest of some differences, 0 if there are none; NaN if one of them is."""
    for each_of in differences:
        if math.isnan(each_of):
            return each_of
    return max(differences, default=0.0)


def difference_in_batches(
    expected: nn.Module, actual: nn.Module, inputs: Tensor, tolerance: float
) -> float:
    """The largest difference of two networks' outputs on all of `inputs` (N, *input_shape), and on
    the last three and one of them, as `difference` gives it; infinite where `actual` raises an
    error.

    A batch is run at a time, so that memory does not grow with N.
    """
    found: dict[tuple[int, torch.Size], _Compared] = {}
    for batch in (*pieces(inputs), *_last(inputs, 3, 1)):
        wanted = outputs(expected, batch)
        try:
            got = outputs(actual, batch)
        except _ERRORS:
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
            if key in found:
                compared = found[key].joined(compared)
            found[key] = compared
    return _largest([compared.relative(tolerance) for compared in found.values()])


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
        rounding = _ROUNDING * self.eps / tolerance
        scale = spread + self.largest * rounding
        smallest = torch.finfo(torch.float64).tiny
        relative = self.apart / scale.clamp_min(smallest)
        return float(relative.max())


def _relative(compared: "_Compared | float", tolerance: float) -> float:
    if isinstance(compared, float):
        return compared
    return compared.relative(tolerance)


def _by_kind(wanted: Any, got: Any) -> float | None:
    """0 or infinity where two outputs are not both tensors of some numbers; None where they are, of
    the same shape and type."""
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        same = type(wanted) is type(got) and wanted == got
    elif wanted.shape != got.shape or wanted.dtype != got.dtype:
        same = False
    elif wanted.is_floating_point() and wanted.numel():
        return None
    else:
        same = torch.equal(wanted, got)
    return 0.0 if same else float("inf")


def _compared(wanted: Any, got: Any, wider: Any, *, both_nan: bool) -> "_Compared | float":
    """Two outputs compared, the spread being that of `wider`; 0 or infinity where that takes no
    numbers."""
    by_kind = _by_kind(wanted, got)
    if by_kind is not None:
        return by_kind
    if not _fits(wider, wanted):
        wider = wanted
    eps = torch.finfo(wanted.dtype).eps
    apart = _apart(wanted.double(), got.double(), both_nan=both_nan)
    wider = wider.double()
    finite = wider.isfinite()
    without_infinities = torch.where(finite, wider, 0)
    largest = without_infinities.abs().max()
    if wider.dim() == 0:
        none = torch.zeros_like(apart)
        return _Compared(apart, none, none, largest, eps)
    high = torch.where(finite, wider, -torch.inf)
    low = torch.where(finite, wider, torch.inf)
    return _Compared(
        apart.amax(0, keepdim=True),
        high.amax(0, keepdim=True),
        low.amin(0, keepdim=True),
        largest,
        eps,
    )


def _fits(wider: Any, wanted: Tensor) -> bool:
    """Whether outputs for more inputs are of the same elements."""
    if not isinstance(wider, Tensor) or wider.dim() != wanted.dim():
        return False
    return wider.shape[1:] == wanted.shape[1:]


def _apart(wanted: Tensor, got: Tensor, *, both_nan: bool) -> Tensor:
    """How far each entry of two outputs is apart."""
    equal = wanted == got  # infinities too
    if both_nan:
        equal |= wanted.isnan() & got.isnan()
    gap = got - wanted
    return torch.where(equal, 0, gap.abs())


def _seen(inputs: Tensor) -> tuple[int, int]:
    """How many real inputs are looked at, and how many are drawn of each kind."""
    if _entries(inputs) > _LARGE:
        return _REAL_LARGE, _FRESH_LARGE
    return _REAL, _FRESH


def _batches(real: Tensor, drawn: int) -> Iterator[Tensor]:
    """Real inputs, three (if they are not large) and one of them where there are more; then as many
    fresh ones as are to be drawn: real values in new combinations, and normal ones."""
    yield real
    small = (1,) if drawn == _FRESH_LARGE else (3, 1)
    yield from _last(real, *small)
    if not drawn:
        return
    generator = torch.Generator().manual_seed(0)
    recombined = partial(_recombined, generator, drawn)
    yield each(real, recombined)
    parts = tensors(real).values()
    if any(_has_fractions(tensor) for tensor in parts):  # whole numbers may be indices
        normal = partial(_normal, generator, drawn + 1)
        yield each(real, normal)


def _last(inputs: Tensor, *counts: int) -> Iterator[Tensor]:
    """So many of the last inputs, where there are more."""
    for count in counts:
        if count < len(inputs):
            yield inputs[-count:]


def _recombined(generator: torch.Generator, count: int, real: Tensor) -> Tensor:
    """Real values (N, …) in new combinations, (count, …)."""
    features = real.reshape(len(real), -1)
    shape = (count, features.shape[1])
    drawn = torch.randint(len(real), shape, generator=generator)
    values = features.gather(0, drawn.to(real.device))
    return values.reshape(count, *real.shape[1:])


def _has_fractions(real: Tensor) -> bool:
    if not real.is_floating_point():
        return False
    is_whole = real == real.round()
    return not bool(is_whole.all())


def _normal(generator: torch.Generator, count: int, real: Tensor) -> Tensor:
    """Normal values of the mean and deviation of the real ones (N, …), (count, …); whole
    numbers of them in their order."""
    if not _has_fractions(real):
        places = torch.arange(count, device=real.device)
        return real[places % len(real)]
    scale = real.std() if real.numel() > 1 else real.abs().max()
    shape = (count, *real.shape[1:])
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    scaled = normal.to(real) * scale
    return scaled + real.mean()
