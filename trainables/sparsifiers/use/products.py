"""How often the numbers of a parameter are used where code multiplies by it, rather than a layer of
torch: layers of one's own, stacked experts, tables that outputs are compared with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import flattened, without_compiler


def uses_in_products(
    network: nn.Module, inputs: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, float]:
    """How often each entry of these parameters is used in products for one input, by name: half of
    the FLOPs of what is called with it or with a view of it, for each of its entries.

    What is computed of a parameter before it is multiplied is another tensor, and not followed.
    """
    if not parameters:
        return {}
    products = _Products(parameters)
    with evaluating(network), torch.no_grad(), without_compiler(), products:
        network(inputs.clone())
    uses = {}
    for name, flops in products.flops.items():
        entries = parameters[name].numel()
        uses[name] = flops / 2 / entries / len(inputs)
    return uses


class _Products(TorchFunctionMode):
    """Counts the FLOPs of each call that is given a parameter or a view of it."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {_memory(parameter): name for name, parameter in parameters.items()}
        self.flops: dict[str, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        named = self._named(args, kwargs)
        if not named:
            return func(*args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            made = func(*args, **kwargs)
        counted: int = counter.get_total_flops()
        for name in named:
            self.flops[name] = self.flops.get(name, 0) + counted
        return made

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
        """The parameters among the arguments of a call, by name."""
        found = set()
        given, _ = flattened((args, kwargs))
        for one in given:
            name = self.names.get(_memory(one)) if isinstance(one, Tensor) else None
            if name is not None:
                found.add(name)
        return found


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor, and all views of it, lie; None of a sparse one."""
    if tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage().data_ptr()
