"""Networks as slimfront calls them: one argument, one tensor."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Call, Several, by_place
from slimfront.trainables.models.base import Model
from slimfront.trainables.models.weights import load_weights
from slimfront.trainables.options import suggest

Parameters = Mapping[str, inspect.Parameter]
"""The arguments of a forward, by name."""

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


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
    names = call.names
    output = call.output
    if names is None and output is None:
        return network
    if names is not None:
        _check_names(network, names)
    kind = type(network)
    forward = _own_forward(network)

    def adapted_forward(self: nn.Module, inputs: Any) -> Any:
        if names is None:
            made = forward(self, inputs)
        elif by_place(names):
            placed = [inputs[name] for name in names]
            made = forward(self, *placed)
        else:
            named = {name: inputs[name] for name in names}
            made = forward(self, **named)
        if output is None:
            return made
        return picked(made, output)

    adapted_forward.__doc__ = forward.__doc__
    network.__class__ = type(kind.__name__, (kind,), {"forward": adapted_forward})
    return network


def _own_forward(network: nn.Module) -> Callable[..., Any]:
    """The function that a network is run by, with the network as its first argument. One that was
    set on this network alone is taken off it: it would go before that of a class.

    Where Accelerate has wrapped it, for mixed precision, it is the one within.
    """
    of_class: Callable[..., Any] = type(network).forward
    own = vars(network).pop("forward", None)
    if own is None:
        return of_class
    set_here: Callable[..., Any] = vars(network).pop("_original_forward", own)
    is_of_class = getattr(set_here, "__func__", None) is of_class
    if is_of_class:
        return of_class

    def forward(_network: nn.Module, *inputs: Any, **named: Any) -> Any:
        return set_here(*inputs, **named)

    return forward


def as_called_with(network: nn.Module, inputs: Tensor, output: str | int | None) -> nn.Module:
    """The network as it is called with these inputs, `Several` or one tensor; it shares all modules
    and parameters with `network`, which keeps its class.

    Raises:
        UserError: if forward has no arguments of these names.
    """
    names = None
    if isinstance(inputs, Several):
        names = tuple(inputs.named)
    if names is None and output is None:
        return network
    call = Call(names, output)
    same_modules = copy.copy(network)
    return adapted(same_modules, call)


def in_order_of_forward(network: nn.Module, names: Sequence[str]) -> list[str]:
    """The same names as forward has them, so that they may be given by their places too; those of
    inputs that are given by place stay as they are."""
    parameters = list(inspect.signature(network.forward).parameters)

    def place(name: str) -> int:
        return parameters.index(name) if name in parameters else len(parameters)

    return sorted(names, key=place)


def _check_names(network: nn.Module, names: Sequence[str]) -> None:
    parameters = inspect.signature(network.forward).parameters
    what = f"{type(network).__name__}.forward"
    if by_place(names):
        _check_places(parameters, names, what)
        return
    if _has_kind(parameters, inspect.Parameter.VAR_KEYWORD):
        return
    for name in names:
        if name not in parameters:
            hint = suggest(name, parameters)
            raise UserError(
                f"the data has the input '{name}', and {what} has no such argument; {hint}"
            )
    for name, parameter in parameters.items():
        if name in names or parameter.kind not in _BY_NAME:
            continue
        if _has_no_default(parameter):
            there = ", ".join(names)
            raise UserError(f"{what} needs '{name}', and the data has only {there}")


def _check_places(parameters: Parameters, names: Sequence[str], what: str) -> None:
    """As `_check_names`, for inputs that are given by their places."""
    count = len(names)
    placed = []
    by_name_alone = []
    for parameter in parameters.values():
        if parameter.kind in _BY_PLACE:
            placed.append(parameter)
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            by_name_alone.append(parameter)
    takes_any = _has_kind(parameters, inspect.Parameter.VAR_POSITIONAL)
    most = len(placed)
    if most < count and not takes_any:
        raise UserError(f"the data has {count} inputs, and {what} takes {most} by their places")
    not_given = placed[count:] + by_name_alone
    for parameter in not_given:
        if _has_no_default(parameter):
            name = parameter.name
            raise UserError(f"{what} needs '{name}', and the data has {count} inputs")


def _has_kind(parameters: Parameters, kind: object) -> bool:
    return any(parameter.kind is kind for parameter in parameters.values())


def _has_no_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


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
        if isinstance(output, str) and not isinstance(made, Mapping):
            return getattr(made, output)
        return made[output]
    except (KeyError, IndexError, TypeError, AttributeError):
        known = list(made) if isinstance(made, Mapping) else type(made).__name__
        raise UserError(
            f"task.output is {output!r}, and the network returns {known}, which has none such"
        ) from None
