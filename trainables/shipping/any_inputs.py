"""`slimfront.compact`, `measure` and `save_network`: of a network of any inputs, as its user calls
it."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables import compaction
from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.errors import first_few
from slimfront.trainables.inputs import Several, as_one, each
from slimfront.trainables.measures import measure as measures
from slimfront.trainables.models.adapted import as_called_with, in_order_of_forward
from slimfront.trainables.options import validated
from slimfront.trainables.shipping.formats import format_of, load, save
from slimfront.trainables.shipping.shipped import ByArguments, Shipped
from slimfront.trainables.structure.agreement import outputs
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import hooks_that_change

log = logging.getLogger(__name__)


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
    view = as_called_with(network, given, output)
    name_hooks(network, view, given)
    made = compaction.compact(view, given, options)
    if not isinstance(given, Several):
        return made
    names = in_order_of_forward(network, list(given.named))
    return Compacted(ByArguments(made.network, names).eval(), made.report)


def name_hooks(network: nn.Module, view: nn.Module, inputs: Tensor) -> None:
    """Warns of code of the user's that is in no module, of which files have nothing; `view` is the
    network as it is called with `inputs` (N, *input_shape)."""

    def run() -> None:
        # Of any kind: whoever runs it next says why.
        with suppress(Exception), evaluating(network), torch.no_grad():
            outputs(view, inputs[:2])

    changing = hooks_that_change(network, run)
    names = [f"'{name}'" if name else "the network itself" for name in changing]
    if names:
        log.warning(
            "forward hooks are no part of a network that is stored, and what they change may be "
            "lost or have compaction refused; put what they do into a forward, or take them off. "
            "They change what it computes at %s",
            first_few(names),
        )


def save_network(network: nn.Module | Compacted, path: Path | str, inputs: Any) -> None:
    """Writes a network to a file, as it is in evaluation mode, on the CPU; `network` stays as it
    is.

    Args:
        network: a compact one; any other that can be traced.
        path: `.onnx` for any ONNX runtime, `.pt2` for torch, `.safetensors` for `load_network`;
            each takes batches of any size.
        inputs: at least two, as of `compact`, of the types that the file is to take.

    Raises:
        UserError: if the suffix is of none of these, or the format cannot hold this network.
    """
    path = Path(path)
    kind = format_of(path)
    if isinstance(network, Compacted):
        network = network.network
    given = as_one(inputs)
    if isinstance(network, ByArguments):
        network = network.network
    else:
        network = as_called_with(network, given, None)
    here = copied(network).cpu()
    # Exporters take parts of tensors for something else.
    whole = each(given.cpu(), Tensor.contiguous)
    save(Shipped(here, None, None), whole, path, kind)


load_network = load
"""Reads what `save_network` or an export wrote."""


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
