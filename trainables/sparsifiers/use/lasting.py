"""Whether a weight that is 0 is so where it is used: a layer may change its weights first, as one
that subtracts their mean does, and compute with numbers that are not 0."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimfront.trainables.structure.copying import copied
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import flattened

_PRODUCTS = (
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum"),
    *("tensordot", "embedding", "multi_head_attention_forward", "mv", "dot", "baddbmm"),
    *(f"conv{axes}d" for axes in (1, 2, 3)),
    *(f"conv_transpose{axes}d" for axes in (1, 2, 3)),
)
"""Functions whose output has nothing to do with the places of a weight, though it may be of its
shape."""


def not_lasting(network: nn.Module, inputs: Tensor, names: Iterable[str]) -> list[str]:
    """Those of these parameters whose zeros are no zeros any more when they are used: found by
    running a copy of which every second weight is 0. None where it cannot be run."""
    # Of any kind: whoever copies the network or runs it next says why.
    with suppress(Exception):
        return _not_lasting(copied(network), inputs, names)
    return []


@torch.no_grad()
def _not_lasting(twin: nn.Module, inputs: Tensor, names: Iterable[str]) -> list[str]:
    weights: dict[str, Tensor] = {}
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters and parameters[name].dim() > 1:
            weights[name] = parameters[name]
    for weight in weights.values():  # in any memory format
        places = torch.arange(weight.numel(), device=weight.device)
        weight.masked_fill_((places % 2 == 0).view(weight.shape), 0)
    watch = _Changed(weights)
    with evaluating(twin), watch:
        twin(inputs)
    return [name for name in weights if name in watch.changed]


class _Changed(TorchFunctionMode):
    """Looks for functions that make of a parameter another one of its shape, with other numbers
    where it is 0."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.changed: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor) or getattr(func, "__name__", "") in _PRODUCTS:
            return made
        given, _ = flattened((args, kwargs))
        for weight in given:
            name = self.names.get(id(weight)) if isinstance(weight, Tensor) else None
            if name is None or made.shape != weight.shape:
                continue
            if bool(made[weight == 0].any()):
                self.changed.add(name)
        return made
