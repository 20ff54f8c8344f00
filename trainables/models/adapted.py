"""Networks as slimfront calls them: one argument, one tensor."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Call, Several, by_place
from slimfront.trainables.models.base import Model
from slimfront.trainables.models.weights import load_weights
from slimfront.trainables.options import suggest


def built(model: Model, data: Dataset) -> nn.Module:
    """A network for a data set and its task, with the weights that it starts from, or freshly
    initialised.

    Raises:
        UserError: if it cannot be built, does not take the data's inputs, or its weights do not
            fit.
    """
    network = model.build(data.input_shape, data.head)
    if model.weights is not None:
        load_weights(network, model.weights, strict=model.strict)
    return adapted(network, data.call)


def adapted(network: nn.Module, call: Call) -> nn.Module:
    """The same network, which takes the inputs as one argument and returns one of its outputs.

    It gets a class of its own, which calls the forward of its old one: modules keep their names,
    and tracing sees through it. Arguments of forward that the inputs do not have keep their
    defaults.

    Raises:
        UserError: if forward has no arguments of these names.
    """
    names, output = call.names, call.output
    if names is None and output is None:
        return network
    if names is not None:
        _check_names(network, names)
    kind = type(network)
    forward = kind.forward

    def adapted_forward(self: nn.Module, inputs: Any) -> Any:
        if names is None:
            made = forward(self, inputs)
        elif by_place(names):
            made = forward(self, *(inputs[name] for name in names))
        else:
            made = forward(self, **{name: inputs[name] for name in names})
        return made if output is None else picked(made, output)

    adapted_forward.__doc__ = forward.__doc__
    network.__class__ = type(kind.__name__, (kind,), {"forward": adapted_forward})
    return network


def as_called_with(network: nn.Module, inputs: Tensor, output: str | int | None) -> nn.Module:
    """The network as it is called with these inputs, `Several` or one tensor; it shares all modules
    and parameters with `network`, which keeps its class.

    Raises:
        UserError: if forward has no arguments of these names.
    """
    names = tuple(inputs.named) if isinstance(inputs, Several) else None
    if names is None and output is None:
        return network
    return adapted(copy.copy(network), Call(names, output))


def _check_names(network: nn.Module, names: Sequence[str]) -> None:
    parameters = inspect.signature(network.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    what = f"{type(network).__name__}.forward"
    if by_place(names):
        _check_places(parameters, names, what)
        return
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return
    for name in names:
        if name not in parameters:
            raise UserError(
                f"the data has the input '{name}', and {what} has no such argument; "
                f"{suggest(name, parameters)}"
            )
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in names
    ]
    if missing:
        raise UserError(f"{what} needs '{missing[0]}', and the data has only {', '.join(names)}")


def _check_places(
    parameters: Mapping[str, inspect.Parameter], names: Sequence[str], what: str
) -> None:
    """As `_check_names`, for inputs that are given by their places."""
    every = list(parameters.values())
    placed = [one for one in every if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if all(one.kind != one.VAR_POSITIONAL for one in every) and len(placed) < len(names):
        raise UserError(
            f"the data has {len(names)} inputs, and {what} takes {len(placed)} by their places"
        )
    rest = [*placed[len(names) :], *(one for one in every if one.kind == one.KEYWORD_ONLY)]
    missing = [one.name for one in rest if one.default is one.empty]
    if missing:
        raise UserError(f"{what} needs '{missing[0]}', and the data has {len(names)} inputs")


def picked(made: Any, output: str | int) -> Any:
    """The output of that key, attribute or place.

    Raises:
        UserError: if there is none.
    """
    if isinstance(made, Tensor):
        raise UserError(
            f"task.output is {output!r}, and the network returns one tensor; leave task.output out"
        )
    try:
        named = isinstance(output, str) and not isinstance(made, Mapping)
        return getattr(made, str(output)) if named else made[output]
    except (KeyError, IndexError, TypeError, AttributeError):
        known = list(made) if isinstance(made, Mapping) else type(made).__name__
        raise UserError(
            f"task.output is {output!r}, and the network returns {known}, which has none such"
        ) from None
