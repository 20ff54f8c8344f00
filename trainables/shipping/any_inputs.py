"""`slimfront.compact` and `slimfront.measure`: of a network of any inputs, as its user calls it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimfront.trainables import compaction
from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.inputs import Several, as_one
from slimfront.trainables.measures import measure as measures
from slimfront.trainables.models.adapted import as_called_with, in_order_of_forward
from slimfront.trainables.options import validated
from slimfront.trainables.shipping.shipped import ByArguments


def compact(
    network: nn.Module,
    inputs: Any,
    options: Compaction | Mapping[str, Any] | None = None,
    *,
    output: str | int | None = None,
) -> Compacted:
    """Makes a trained network smaller, with the same outputs in evaluation mode; `network` is left
    as it is.

    Args:
        network: a trained network that torch.fx can trace, or torch.export.
        inputs: real inputs, on which the outputs of both are compared, as the network is called: a
            tensor (N, …), a tuple of tensors, or a mapping of tensors by the names of forward's
            arguments.
        options: of compaction, as in a config; the defaults if None.
        output: which of several outputs counts, and is what the compact network returns: a key, an
            attribute or a place; None: all of them.

    Returns:
        The compact network, which is called as `network` is, with what was done and its measures.

    Raises:
        TrialFailure: if the network gives NaN, or compaction changed the outputs.
        UserError: if the inputs are something else, or the network cannot be traced.
    """
    if isinstance(options, Mapping):
        options = validated(Compaction, options, "compact")
    given = as_one(inputs)
    made = compaction.compact(as_called_with(network, given, output), given, options)
    if not isinstance(given, Several):
        return made
    names = in_order_of_forward(network, list(given.named))
    return Compacted(ByArguments(made.network, names).eval(), made.report)


def measure(network: nn.Module, inputs: Any) -> dict[str, float]:
    """The parameters, FLOPs and bytes of a network; see `measures.measure.measure`.

    Args:
        network: in any mode, which it keeps.
        inputs: at least one, as of `compact`.

    Raises:
        UserError: if the inputs are something else.
    """
    given = as_one(inputs)
    return measures.measure(as_called_with(network, given, None), given)
