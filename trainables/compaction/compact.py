"""Compaction: merging and removal, checked on real inputs, with a report of what was done."""

import io
import logging
import math
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.exact import restore_types
from slimfront.trainables.compaction.layers import count_nonzeros, count_weights
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.compaction.reduction import (
    REMOVALS,
    Removal,
    Start,
    is_reduced,
    merge_approximately,
    reduced,
    start_of,
)
from slimfront.trainables.compaction.report import Compacted, Report, Step
from slimfront.trainables.compaction.zeros import name_what_stays
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.inputs import Several, described
from slimfront.trainables.measures.measure import count_flops, measure
from slimfront.trainables.precision import all_of_float32
from slimfront.trainables.structure.agreement import (
    SEEN,
    difference,
    difference_in_batches,
    outputs,
    refuse_opaque,
)
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.copying import copied, left_as_it_was
from slimfront.trainables.structure.graph import Conv
from slimfront.trainables.structure.tracing.other_sizes import of_other_sizes
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import flattened

log = logging.getLogger(__name__)

_TWICE = 1e-4
"""How far two runs of one network may be apart, by the order of sums on several threads."""
_TWICE_ELSEWHERE = 1e-2
"""The same on a GPU, where sums of half precision come in any order."""
_OF_OTHER_SIZES = 1e-2
"""How far outputs for inputs of other sizes may be apart, relative to their spread: what is wrong
there is wrong by more."""


@dataclass(frozen=True)
class _Smaller:
    """A network made smaller, and what was done to it."""

    network: nn.Module
    steps: list[Step]
    apart: float = 0.0
    """How far its outputs are from the model's where that was judged exactly; 0 if that is within
    the tolerance."""
    is_copy: bool = False
    """Whether it is the model's own graph with its own weights, so that nothing can differ."""


def compact(
    model: nn.Module,
    inputs: Tensor,
    options: Compaction | None = None,
    told: set[str] | None = None,
) -> Compacted:
    """A smaller network with the same outputs in evaluation mode; `model` is left as it is.

    What is folded, removed and merged is done and judged in float64, where the network can be run
    so, on a few of `inputs` and on fresh ones: a right step changes nothing there but the order of
    sums. A removal that changes more is undone: the units stay. The result, in the network's own
    type, is compared once more on all of `inputs`.

    Args:
        model: a trained network that torch.fx can trace, or torch.export.
        inputs: (N, *input_shape) real inputs, on which the two networks' outputs are compared.
        options: the defaults if None.
        told: the layers whose zero units were warned of before, which are not warned of again;
            those that are warned of here are added.

    Raises:
        TrialFailure: if the network gives NaN; if the outputs differ in structure, shape or type,
            or by more than the tolerance, relative to their spread.
        UserError: if the network cannot be traced, or has attention that cannot be taken apart.
    """
    options = options or Compaction()
    told = set() if told is None else told
    with evaluating(model), all_of_float32():
        _check_numbers(model, inputs)
        smaller = _smaller(model, inputs, options)
        network = smaller.network
        steps = list(smaller.steps)
        apart = smaller.apart
        if apart <= options.tolerance and not smaller.is_copy:
            on_inputs = relative_difference(model, network, inputs, options.tolerance)
            apart = max(apart, on_inputs, key=_badness)
        if isinstance(network, GraphModule):
            if options.approximate:
                steps += merge_approximately(network, options.merge)
            steps += name_what_stays(network, inputs, options, told)
            if not options.approximate and not smaller.is_copy:
                with left_as_it_was(model):
                    _name_sizes(model, network, inputs[:2])
    if not apart <= options.tolerance:  # NaN too
        raise TrialFailure(
            f"compaction changed the outputs by {apart:.2e} of their spread; the tolerance is "
            f"{options.tolerance:.0e}"
        )
    report = Report(
        steps=tuple(steps),
        difference=apart,
        after=measure(network, inputs),
    )
    return Compacted(network, report)


def _check_numbers(model: nn.Module, inputs: Tensor) -> None:
    """Raises TrialFailure where a network gives NaN: nothing can be compared with that; and
    UserError where the inputs are no tensor, or outputs are none."""
    if not isinstance(inputs, Tensor | Several):
        raise UserError(
            f"compact: the inputs are a {type(inputs).__name__}, and must be a tensor (N, …)"
        )
    made = outputs(model, inputs[:SEEN])
    refuse_opaque(made)
    again = outputs(model, inputs[:SEEN])
    allowed = _TWICE if inputs.device.type == "cpu" else _TWICE_ELSEWHERE
    if difference(made, again, allowed, both_nan=True) > allowed:
        raise UserError(
            "the network does not compute the same twice in evaluation mode, so that nothing can "
            "be compared with it: something in it counts or remembers, such as the observers of a "
            "quantisation; switch that off before"
        )
    leaves, _ = flattened(made)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.isnan().any():
            raise TrialFailure(
                "the network gives NaN for the inputs that compaction compares outputs on, so that "
                "it has diverged, or the inputs are out of the range that it takes"
            )


def _name_sizes(model: nn.Module, network: nn.Module, inputs: Tensor) -> None:
    """Warns of inputs of other sizes that the model takes, and the compact network does not."""
    for other in of_other_sizes(inputs, partial(outputs, model)):
        apart = math.inf
        with suppress(Exception), redirect_stderr(io.StringIO()):  # it may not take them
            wanted = outputs(model, other)
            made = outputs(network, other)
            apart = difference(wanted, made, _OF_OTHER_SIZES, both_nan=True)
        if not apart <= _OF_OTHER_SIZES:
            log.warning(
                "the compact network computes the same for inputs of the size that it was made "
                "with, %s, and not for %s, which the network takes too; call it with inputs of "
                "that size, or have its code take each size from a shape, as in "
                "n, c, h, w = x.shape, and not decide by it, so that torch.fx can trace it",
                described(inputs),
                described(other),
            )
            return


def relative_difference(
    expected: nn.Module, actual: nn.Module, inputs: Tensor, tolerance: float
) -> float:
    """The largest difference of an output on `inputs`, and on one and three of them, relative to
    its spread.

    See `agreement.difference_in_batches`.
    """
    return difference_in_batches(expected, actual, inputs, tolerance)


def _badness(apart: float) -> float:
    if math.isnan(apart):
        return math.inf
    return apart


def _smaller(model: nn.Module, inputs: Tensor, options: Compaction) -> _Smaller:
    """The network made smaller, as compaction's options say.

    If its outputs are too far from the model's, each kind of removal is tried alone, and left out
    if it is to blame.
    """
    if not options.enabled:
        return _Smaller(copied(model), [])
    inputs = inputs[:SEEN]
    original = traced_in_both_modes(model, inputs[:3])
    if isinstance(model, GraphModule) and is_reduced(original, inputs, options):
        return _Smaller(make_quick(original), [], is_copy=True)
    network, smaller = _tried(original, inputs, options, REMOVALS)
    if smaller.apart != 0:  # NaN too
        right = _right_removals(original, inputs, options)
        network, smaller = _tried(original, inputs, options, right)
    restore_types(network, original)
    grown = ""
    may_grow = options.merge == "always"
    if not may_grow:
        grown = _grown(original, network, inputs, smaller.steps)
    if grown:
        log.warning("compaction leaves the network as it is: it would have more %s", grown)
        unchanged = _unchanged(original)
        return _Smaller(make_quick(unchanged), [])
    make_quick(network)
    return smaller


def _tried(
    original: GraphModule, inputs: Tensor, options: Compaction, removals: tuple[Removal, ...]
) -> tuple[GraphModule, _Smaller]:
    """The network after all exact steps with these kinds of removal."""
    start = start_of(original, inputs, options)
    network, done = reduced(start, options, removals)
    apart = start.probe.difference(network, start.tolerance)
    if apart <= start.tolerance:
        apart = 0.0
    smaller = _Smaller(
        network=network,
        steps=[*start.steps, *done],
        apart=apart,
    )
    return network, smaller


def _right_removals(
    original: GraphModule, inputs: Tensor, options: Compaction
) -> tuple[Removal, ...]:
    """The kinds of removal that change no output where each is done alone."""
    without_merging = {"merge": "never"}
    alone = options.model_copy(update=without_merging)
    right = []
    for kind in REMOVALS:
        start = start_of(original, inputs, alone)
        if _is_right(start, alone, kind):
            right.append(kind)
    wrong = set(REMOVALS) - set(right)
    for kind in wrong:
        log.warning("compaction removes no %s: that would change the outputs", kind)
    return tuple(right)


def _is_right(start: Start, options: Compaction, kind: Removal) -> bool:
    network, _ = reduced(start, options, (kind,))
    return start.probe.agrees(network, start.tolerance)


def _grown(before: nn.Module, after: nn.Module, inputs: Tensor, steps: list[Step]) -> str:
    """Which sizes grew, in words; merging and removal make none of them larger, unless weights that
    are shared come apart.

    FLOPs are counted only where merged convolutions could have more of them: where there are
    others, they follow from weights.
    """
    sizes_before = _sizes(before)
    sizes_after = _sizes(after)
    if _may_have_merged_convolutions(after, steps):
        one_input = inputs[:1]
        sizes_before["FLOPs"] = count_flops(before, one_input)
        sizes_after["FLOPs"] = count_flops(after, one_input)
    grown = []
    for name, size in sizes_before.items():
        if sizes_after[name] > size:
            grown.append(name)
    return " and ".join(grown)


def _may_have_merged_convolutions(network: nn.Module, steps: list[Step]) -> bool:
    actions = {action for _, action, _ in steps}
    if "merged" not in actions:
        return False
    return any(isinstance(module, Conv) for module in network.modules())


def _sizes(network: nn.Module) -> dict[str, float]:
    return {
        "parameters": count_weights(network),
        "non-zero parameters": count_nonzeros(network),
    }


def _unchanged(original: GraphModule) -> GraphModule:
    network = copied(original).eval()
    split_attention(network)
    return network
