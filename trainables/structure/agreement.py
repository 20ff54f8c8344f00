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
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import each, tensors
from slimfront.trainables.structure.comparing import Compared, compare
from slimfront.trainables.tasks.evaluating import fitting_caches
from slimfront.trainables.torch_internals import flattened

EXACT = 1e-10
"""How far outputs in float64 may be apart, relative to their spread, where only sums were taken in
another order."""

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

_PLAIN = (Tensor, int, float, complex, str, type(None), type, torch.dtype, torch.device)
"""What may be within outputs."""

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
        real = len(inputs)
        drawn = 0
        if fresh:
            real, drawn = _seen(inputs)
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
            spread_of = wanted
            if len(batch) < _FEW:
                spread_of = reference
            found = difference(
                wanted,
                got,
                tolerance,
                spread_of,
                both_nan=number > 0,
            )
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
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            if leaf.isnan().any():
                return False
        return True

    def agrees(self, actual: nn.Module, tolerance: float = EXACT, *, briefly: bool = False) -> bool:
        """Whether no output differs by more than `tolerance`; `briefly` as in `difference`."""
        found = self.difference(actual, tolerance, briefly=briefly)
        return found <= tolerance


@torch.no_grad()
def refuse_opaque(made: Outputs) -> None:
    """Raises UserError where a network returns objects, such as caches, that hold tensors which
    nobody sees."""
    leaves, _ = flattened(made)
    for leaf in leaves:
        if not isinstance(leaf, _PLAIN):
            within = ""
            if leaf is not made:
                within = f" within its {type(made).__name__}"
            which = "1" if isinstance(made, list | tuple) else "'logits'"
            raise UserError(
                f"the network returns a {type(leaf).__name__}{within}, whose tensors are not seen; "
                f"say which of the outputs counts by output, such as output={which} (in a config "
                "task.output)"
            )


def outputs(network: nn.Module, inputs: Tensor) -> Outputs:
    """What a network returns in evaluation mode; what it draws at random there, it draws alike in
    every call."""
    gpus = []
    if inputs.device.type == "cuda":
        gpus = [inputs.device]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all GPUs
        if gpus:
            torch.cuda.manual_seed(0)
        if isinstance(network, GraphModule):
            # Called itself, and not its forward, it prints a traceback of its own for what it
            # raises.
            return network.forward(inputs.clone())
        return network(inputs.clone())


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
    if spread_of is None:
        spread_of = wanted
    leaves, structure = flattened(wanted)
    others, other_structure = flattened(got)
    if structure != other_structure:
        return float("inf")
    wider, wider_structure = flattened(spread_of)
    if wider_structure != structure:
        wider = leaves
    found = []
    for leaf, other, wide in zip(leaves, others, wider, strict=True):
        compared = compare(
            wanted=leaf,
            got=other,
            wider=wide,
            both_nan=both_nan,
        )
        found.append(_relative(compared, tolerance))
    return _largest(found)


def _largest(differences: list[float]) -> float:
    """The largest of some differences, 0 if there are none; NaN if one of them is."""
    for each_of in differences:
        if math.isnan(each_of):
            return each_of
    return max(differences, default=0.0)


def _relative(compared: Compared | float, tolerance: float) -> float:
    if isinstance(compared, float):
        return compared
    return compared.relative(tolerance)


def difference_in_batches(
    expected: nn.Module, actual: nn.Module, inputs: Tensor, tolerance: float
) -> float:
    """The largest difference of two networks' outputs on all of `inputs` (N, *input_shape), and on
    the last three and one of them, as `difference` gives it; infinite where `actual` raises an
    error.

    A batch is run at a time, so that memory does not grow with N.
    """
    found: dict[tuple[int, torch.Size], Compared] = {}
    for number, batch in enumerate((*pieces(inputs, expected), *_last(inputs, 3, 1))):
        try:
            wanted = outputs(expected, batch)
        except _ERRORS:
            if number == 0:
                raise
            continue  # it takes no batches as small
        try:
            got = outputs(actual, batch)
        except _ERRORS:
            return float("inf")
        leaves, structure = flattened(wanted)
        others, other_structure = flattened(got)
        if structure != other_structure:
            return float("inf")
        for place, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
            compared = compare(
                wanted=leaf,
                got=other,
                wider=leaf,
                both_nan=False,
            )
            if isinstance(compared, float):
                if compared > 0:
                    return compared
                continue
            key = place, compared.apart.shape
            if key in found:
                compared = found[key].joined(compared)
            found[key] = compared
    differences = [compared.relative(tolerance) for compared in found.values()]
    return _largest(differences)


def pieces(inputs: Tensor, network: nn.Module) -> Iterator[Tensor]:
    """Inputs (N, *input_shape) of a network a batch at a time: few enough that they fit a device's
    memory, or a core's caches."""
    entries = max(_entries(inputs), 1)
    few_enough = _ENTRIES_AT_ONCE // entries
    cached = fitting_caches(network, entries) or _AT_ONCE
    size = max(1, min(_AT_ONCE, few_enough, cached))
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def _entries(inputs: Tensor) -> int:
    """How many entries one input has."""
    count = 0
    for tensor in tensors(inputs).values():
        count += tensor[:1].numel()
    return count


def _seen(inputs: Tensor) -> tuple[int, int]:
    """How many real inputs are looked at, and how many are drawn of each kind."""
    if _entries(inputs) > _LARGE:
        return _REAL_LARGE, _FRESH_LARGE
    return _REAL, _FRESH


def _batches(real: Tensor, drawn: int) -> Iterator[Tensor]:
    """Real inputs, three (if they are not large) and one of them where there are more; then as many
    fresh ones as are to be drawn: real values in new combinations, and normal ones."""
    yield real
    if drawn != _FRESH_LARGE:
        yield from _last(real, 3)
    yield from _last(real, 1)
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
    _, width = features.shape
    drawn = torch.randint(
        len(real),
        size=(count, width),
        generator=generator,
    )
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
    scale = real.abs().max()
    if real.numel() > 1:
        scale = real.std()
    normal = torch.randn(
        size=(count, *real.shape[1:]),
        generator=generator,
        dtype=torch.float64,
    )
    scaled = normal.to(real) * scale
    return scaled + real.mean()
