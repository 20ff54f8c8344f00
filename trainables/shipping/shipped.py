"""A network as it ships: it takes inputs as they come, and gives outputs in the unit of the
targets."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import first_few
from slimfront.trainables.inputs import Several, by_place

CONSTANTS = ("mean", "std", "scale", "offset")


class Shipped(nn.Module):
    """A network that takes inputs as they come, and gives outputs in the unit of the targets:
    normalisation, (x − mean) / std, is its first step, and y · scale + offset its last, where there
    is any."""

    mean: Tensor | None
    std: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        mean: Tensor | None,
        std: Tensor | None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        """`names` are what each output stands for, where the targets that came were something
        else."""
        super().__init__()
        self.network = network
        self.names = names
        for name, constant in zip(CONSTANTS, (mean, std, scale, offset), strict=True):
            self.register_buffer(name, constant)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (N, *input_shape) to outputs (N, …)."""
        if self.mean is not None and self.std is not None:
            centred = inputs.float() - self.mean
            inputs = centred / self.std
        outputs: Tensor = self.network(inputs)
        if self.scale is not None and self.offset is not None:
            outputs = outputs * self.scale + self.offset
        return outputs


class ByArguments(nn.Module):
    """A network of several inputs, each of which is an argument of its own, as in the forward of
    the user's."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)
        arguments = self.names
        if by_place(names):
            arguments = tuple(f"inputs_{name}" for name in names)
        forward = _forward(arguments)
        self.__class__ = type("ByArguments", (ByArguments,), {"forward": forward})

    def __reduce__(self) -> Any:
        """How it is written to a file and copied: its class, which is made for its arguments, is in
        no module."""
        return _by_arguments, (self.names, self.__dict__.copy())


def _by_arguments(names: tuple[str, ...], state: dict[str, Any]) -> ByArguments:
    """What was written to a file."""
    made = ByArguments(nn.Identity(), names)
    made.__dict__.update(state)
    return made


def _forward(names: tuple[str, ...]) -> Callable[..., Tensor]:
    """A forward that has arguments of these names: raw inputs (N, …) each, to outputs (N, …)."""

    def forward(self: ByArguments, *inputs: Tensor, **named: Tensor) -> Tensor:
        placed = dict(zip(names, inputs, strict=False))
        given = placed | named
        if len(inputs) + len(named) != len(names) or given.keys() != set(names):
            called_with = [*placed, *(name for name in named if name not in placed)]
            raise TypeError(
                f"the compact network takes what it was made with, {first_few(names)}, and is "
                f"called with {len(inputs) + len(named)} inputs: {first_few(called_with)}"
            )
        in_order = [given[name] for name in names]
        several = Several(dict(zip(self.names, in_order, strict=True)))
        outputs: Tensor = self.network(several)
        return outputs

    # torch.export asks for the names, and takes no `**named`.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = ("self", *names)
    parameters = [inspect.Parameter(name, kind) for name in arguments]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def as_called(network: Shipped, inputs: Tensor) -> nn.Module:
    """The network as users call it: with each of several inputs an argument of its own."""
    if not isinstance(inputs, Several):
        return network
    names = list(inputs.named)
    return ByArguments(network, names).eval()


def shipped(network: nn.Module, data: Dataset) -> Shipped:
    """A network that takes what `data.prepare` makes, as it ships: in evaluation mode, on the
    CPU."""
    cpu = torch.device("cpu")
    task = data.task.to(cpu)
    mean = None
    std = None
    normalisation = data.normalisation()
    if normalisation is not None:
        mean, std = normalisation
    whole = Shipped(network, mean, std, task.scale, task.offset, data.names)
    return whole.eval()
