"""The graph of any network that has one: by torch.fx, or else by torch.export."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several, tensors
from slimfront.trainables.structure.copying import left_as_it_was
from slimfront.trainables.structure.tracing.exported import CannotExport, exported
from slimfront.trainables.structure.tracing.symbolic import is_known, symbolically_traced
from slimfront.trainables.tasks.evaluating import evaluating

RANK = "rank"
"""Where a node says how many axes its output has."""

_Key = tuple[int, tuple[bool, ...], Hashable]
"""The `id` of a network, the mode of each of its modules, and the shape of its inputs."""
_Known = dict[_Key, tuple[nn.Module, GraphModule]]
"""Networks with their graphs: while a network is held, no other gets its `id`."""
_KNOWN: ContextVar[_Known | None] = ContextVar("known graphs", default=None)


def trace(model: nn.Module, sample: Tensor | None = None) -> GraphModule:
    """The graph of a network; it shares the network's modules and parameters.

    With a `sample` (N, *input_shape) it is also known of how many axes the outputs are, as
    `note_ranks` finds out; and a network that torch.fx cannot trace is exported, as it is in
    evaluation mode.

    Raises:
        UserError: if the network's forward cannot be traced (data-dependent control flow, say).
    """
    known = _KNOWN.get()
    is_traced = isinstance(model, GraphModule)
    if known is None or is_traced:
        return _with_ranks(model, sample)
    key = _key(model, sample)
    if key not in known:
        known[key] = model, _with_ranks(model, sample)
    _, traced = known[key]
    return traced


@contextmanager
def traced_once() -> Iterator[None]:
    """Within, a network is traced once for inputs of one shape, in one mode: for looking at a
    network that nobody changes, several times."""
    if _KNOWN.get() is not None:
        yield
        return
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _key(model: nn.Module, sample: Tensor | None) -> _Key:
    modes = tuple(module.training for module in model.modules())
    shape = None if sample is None else _shapes(sample)
    return id(model), modes, shape


def _shapes(sample: Tensor) -> tuple[Hashable, ...]:
    named = {"": sample}
    if isinstance(sample, Several):
        named = tensors(sample)
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in named.items())


def _with_ranks(model: nn.Module, sample: Tensor | None) -> GraphModule:
    if isinstance(model, GraphModule):
        traced: GraphModule = model
    else:
        with left_as_it_was(model):
            traced = _traced(model, sample)
    if sample is not None:
        note_ranks(traced, sample)
    return traced


def _traced(model: nn.Module, sample: Tensor | None) -> GraphModule:
    traced: GraphModule | None = None
    reason: Exception | None = None
    try:
        traced = symbolically_traced(model, sample)
    except Exception as error:
        reason = error
    if sample is not None and (traced is None or not is_known(traced)):
        try:
            return exported(model, sample)
        except CannotExport as error:
            reason = reason and error
    if traced is not None:
        return traced
    raise UserError(
        f"{type(model).__name__}.forward cannot be traced ({reason}); "
        "layer, node and block penalties and compaction need a forward without data-dependent "
        "control flow"
    ) from reason


class _Ranks(fx.Interpreter):
    """Runs a graph and notes in each node how many axes its output has."""

    def run_node(self, n: Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        n.meta[RANK] = None
        if isinstance(made, Tensor):
            n.meta[RANK] = made.dim()
        return made


def note_ranks(graph: GraphModule, inputs: Tensor) -> None:
    """Notes in each node how many axes its output has for these inputs (N, *input_shape): linear
    layers take any number.

    What cannot be run has no ranks: whoever runs the network says why.
    """
    unknown = suppress(RuntimeError, ValueError, IndexError, TypeError)
    with unknown, evaluating(graph), torch.no_grad(), torch.random.fork_rng(devices=[]):
        few = inputs[:2]
        ranks = _Ranks(graph)
        ranks.run(few.clone())
