"""The batches that a network is pruned on, as slimfront calls networks: one argument."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.data.loaders import pair
from slimfront.trainables.depth.base import Batch
from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line
from slimfront.trainables.inputs import (
    Call,
    Several,
    each,
    joined,
    refuse_without_examples,
    shape_of_one,
    tensors,
)
from slimfront.trainables.models import adapted
from slimfront.trainables.structure.agreement import refuse_opaque
from slimfront.trainables.tasks.evaluating import evaluating

_CHECKED = 1024
"""Compaction is checked on at most so many examples."""


def read(batches: Iterable[Any], *, with_targets: bool) -> list[Batch]:
    """All batches, read once; inputs that are tuples or mappings become `Several`.

    Raises:
        UserError: if there is none, one is empty, or one has another form.
    """
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    found = []
    for given in batches:
        inputs, targets = given, None
        if with_targets:
            inputs, targets = _pair(given)
        found.append(Batch(_inputs(inputs), targets))
    if not found:
        raise UserError("prune: there is no batch; give an iterable of some batches of inputs")
    return found


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, Mapping) and not (isinstance(given, tuple | list) and len(given) > 1):
        raise UserError(
            "prune: with loss=…, a batch is a pair (inputs, targets), and one is a "
            f"{type(given).__name__}"
        )
    return pair(given, "prune: an iterable of batches")


def _inputs(given: Any) -> Tensor:
    named = _by_name(given)
    parts = named.values()
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"prune: a batch is a {type(given).__name__}; it is to be a tensor, or a tuple or a "
            "mapping of tensors"
        )
    if len(named) > 1:
        refuse_without_examples(named)
    for part in parts:
        if part.dim() == 0 or len(part) == 0:
            raise UserError("prune: a batch is empty; its first axis is that of the examples")
    if isinstance(given, Tensor):
        return given
    return Several(named)


def _by_name(given: Any) -> dict[str, Any]:
    """What a batch consists of; nothing where that is not known."""
    if isinstance(given, Tensor):
        return {"": given}
    if isinstance(given, Mapping):
        items: Iterable[tuple[Any, Any]] = given.items()
    elif isinstance(given, tuple | list):
        items = enumerate(given)
    else:
        return {}
    return {str(name): value for name, value in items}


def call_of(batches: list[Batch]) -> Call:
    """How a network is called with these inputs.

    Raises:
        UserError: if one batch has other inputs than the first.
    """
    first = batches[0].inputs
    names = tuple(tensors(first))
    for batch in batches:
        if tuple(tensors(batch.inputs)) != names:
            raise UserError("prune: all batches are to have the same inputs")
    if not isinstance(first, Several):
        return Call(None)
    return Call(names)


def called_with(
    network: nn.Module, batches: list[Batch], output: str | int | None, *, with_targets: bool
) -> nn.Module:
    """The same network, with one argument, which returns the `output` that counts; in place.

    Raises:
        UserError: if it does not take the inputs.
    """
    try:
        return adapted(network, replace(call_of(batches), output=output))
    except UserError as error:
        hint = ""
        if not with_targets and isinstance(batches[0].inputs, Several):
            hint = "; with loss=…, a batch is a pair of inputs and targets"
        raise UserError(f"prune: {error}{hint}") from None


def on_device_of(network: nn.Module, batches: list[Batch]) -> list[Batch]:
    """The batches where the network's parameters are."""
    first = next(network.parameters(), None)
    device = torch.device("cpu") if first is None else first.device

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    moved = []
    for inputs, targets in batches:
        if isinstance(targets, Tensor):
            targets = there(targets)
        moved.append(Batch(each(inputs, there), targets))
    return moved


def check_runs(network: nn.Module, batches: list[Batch]) -> None:
    """Raises UserError if the network cannot be run on the first batch, or returns what is no
    tensor."""
    try:
        with evaluating(network), torch.no_grad():
            refuse_opaque(network(batches[0].inputs.clone()))
    except UserError as error:
        raise UserError(f"prune: {error}") from None
    except OF_USERS_CODE as error:  # of the user's code
        raise UserError(
            f"prune: the network cannot be run on the batches: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def sample_of(batches: list[Batch]) -> Tensor:
    """The examples that compaction is checked on: (N, …), those of the first batches that have one
    shape."""
    first, *others = (batch.inputs for batch in batches)
    sample = first
    for inputs in others:
        if len(sample) >= _CHECKED or _shapes(inputs) != _shapes(first):
            break
        sample = joined(sample, inputs)
    return sample[:_CHECKED]


def _shapes(inputs: Tensor) -> list[tuple[int, ...]]:
    return [shape_of_one(tensor) for tensor in tensors(inputs).values()]
