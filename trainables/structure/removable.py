"""Whether units that are zero can be removed: tried on networks of the same structure with other
weights, too.

On a trained network a wrong removal can go unseen: where a pool takes maxima over units, say, and
the one that goes was never among them on the inputs that were looked at. Of weights that are drawn
at random, all take part.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.inputs import in_float64
from slimfront.trainables.precision import all_of_float32
from slimfront.trainables.structure.agreement import EXACT, Probe
from slimfront.trainables.structure.channel_groups import ChannelGroup, channel_groups, remove_units
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import BatchNorm, WeightLayer
from slimfront.trainables.structure.shared_units import (
    SharedUnits,
    shared_units,
    unknown_operations,
)

log = logging.getLogger(__name__)

_SEEN = 2
"""So few inputs show whether units can be removed from a network whose weights were drawn at
random."""
_BIAS = 0.1
"""The standard deviation of biases that are drawn."""
_LOOSE = 1e-4
"""How far outputs may be apart where a network cannot be run in float64."""


def removable_units(network: nn.Module, inputs: Tensor) -> list[ChannelGroup | SharedUnits]:
    """The groups of units that can be removed once they are zero: those of Torch-Pruning's graph,
    and by our own those that it does not follow.

    Layers where no end is found of what goes with their channels are warned of.

    Raises:
        UserError: if Torch-Pruning cannot analyse the network, and there are none by our own.
    """
    endless: list[str] = []
    failure: UserError | None = None
    groups: list[ChannelGroup] = []
    try:
        groups = removable_groups(network, inputs, endless)
    except UserError as error:
        failure = error
    taken: set[str] = set()
    for group in groups:
        taken.update(group.writers)
    shared = shared_units(network, inputs, taken)
    if failure is not None and not shared:
        raise _told_what_is_unknown(failure, network, inputs)
    found = set()
    for units in shared:
        for parameter in units.writers:
            layer, _, _ = parameter.rpartition(".")
            found.add(layer)
    stay = []
    for name in endless:
        if name not in found:
            stay.append(f"'{name}'")
    if stay:
        log.warning(
            "the channels of %s stay as they are: no end is found of what goes with them",
            ", ".join(stay),
        )
    return [*groups, *shared]


def _told_what_is_unknown(failure: UserError, network: nn.Module, inputs: Tensor) -> UserError:
    """The failure of Torch-Pruning, with what our own graph does not see through either."""
    unknown = unknown_operations(network, inputs)
    if not unknown:
        return failure
    names = first_few([f"'{name}'" for name in unknown])
    return UserError(f"it is not known here what becomes of channels in {names}, and {failure}")


def removable_groups(
    network: nn.Module, inputs: Tensor, endless: list[str] | None = None
) -> list[ChannelGroup]:
    """The groups of `channel_groups` of which a unit that is zero can be removed, which is tried on
    a copy.

    Torch-Pruning takes what it does not know for operations that act on each channel alone. Others,
    such as a norm of another axis, a softmax or a mean over channels, or a size in the code, only
    show then. Layers where no end is found of what goes with their channels are added to
    `endless`.

    Raises:
        UserError: if Torch-Pruning cannot analyse the network.
    """
    groups = channel_groups(network, inputs, endless)
    units = {}
    for group in groups:
        if group.units > 1:
            # One that has neighbours on both sides, which something between them may mix.
            tried = group.units // 3
            numbers = torch.arange(group.units)
            units[group.name] = numbers == tried
    if not units:
        return groups
    right = _right_when_tried(network, inputs[:_SEEN], groups, units)
    found = []
    for group in groups:
        was_tried = group.name in units
        if not was_tried or group.name in right:
            found.append(group)
    return found


def _right_when_tried(
    network: nn.Module, seen: Tensor, groups: list[ChannelGroup], units: dict[str, Tensor]
) -> list[str]:
    """Which of the groups can lose those units, tried on one network of other weights."""

    def zeroed() -> nn.Module:
        return _zeroed(network, groups, units)

    def exact() -> nn.Module:
        return zeroed().double()

    try:
        return _together(
            [_drawn(exact, 0)],
            in_float64(seen),
            dead=units,
            tolerance=EXACT,
            fresh=False,
        )
    except (RuntimeError, TypeError, ValueError):  # it cannot be run in float64
        return _together(
            [_drawn(zeroed, 0)],
            seen,
            dead=units,
            tolerance=_LOOSE,
            fresh=False,
        )


def removable_together(
    network: nn.Module, inputs: Tensor, dead: dict[str, Tensor], tolerance: float = EXACT
) -> list[str]:
    """Which of the groups can lose those units (units,) bool together, all of them zero: the
    outputs change by no more than `tolerance`.

    That is tried on `inputs` and on fresh ones (see `Probe`), with the network's own weights and
    with others that are zero where they are; `network` stays as it is.
    """
    if not dead:
        return []

    def same() -> nn.Module:
        return _plain_copy(network)

    networks = [
        _drawn(same, 0),
        _drawn(same, 1),
        same,
    ]
    return _together(networks, inputs, dead, tolerance)


def _together(
    networks: list[Callable[[], nn.Module]],
    inputs: Tensor,
    dead: dict[str, Tensor],
    tolerance: float,
    *,
    fresh: bool = True,
) -> list[str]:
    """As `removable_together`, tried on what each of `networks` makes."""
    left = dict(dead)
    judged = False
    with torch.no_grad(), all_of_float32():
        for make in networks:
            if not left:
                break
            found = _of_one(
                make,
                inputs,
                dead=left,
                tolerance=tolerance,
                fresh=fresh,
            )
            if found is not None:
                left = {name: dead[name] for name in found}
                judged = True
    if not judged:
        return []
    return list(left)


def _of_one(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    dead: dict[str, Tensor],
    tolerance: float,
    fresh: bool,
) -> list[str] | None:
    """As `_together`, of one network; None if its outputs are no numbers, which says nothing."""
    network = make()
    probe = Probe(network, inputs, fresh=fresh)
    if not probe.is_of_numbers():
        return None
    can_go = _remove(network, inputs, dead)
    if can_go and probe.agrees(network, tolerance):
        return list(dead)  # most often; so that no more copies are made
    network = make()

    def right(names: list[str]) -> bool:
        smaller = copied(network)
        gone = {name: dead[name] for name in names}
        if not _remove(smaller, inputs, gone):
            return False
        return probe.agrees(smaller, tolerance)

    return _rightly_removed(list(dead), right, known_wrong=True)


def _remove(network: nn.Module, inputs: Tensor, dead: dict[str, Tensor]) -> bool:
    """Takes those units out, in place; false if that cannot be done."""
    try:
        remove_units(network, inputs, dead)
    except (RuntimeError, IndexError):  # a shape that does not fit any more
        return False
    return True


def _plain_copy(network: nn.Module) -> nn.Module:
    """A copy whose parametrised weights, such as those under a spectral norm, are plain ones."""
    copy = copied(network)
    for module in list(copy.modules()):
        if not parametrize.is_parametrized(module):
            continue
        of_module: Any = module.parametrizations
        computed = {name: getattr(module, name).detach() for name in of_module}
        # To remove a parametrisation would change the class, which the network's own has too.
        kind = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = kind
        for name, tensor in computed.items():
            module.register_parameter(name, nn.Parameter(tensor))
    return copy


def _drawn(make: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    """Makes what `make` makes, with parameters that are drawn anew where they are not zero."""

    def drawn() -> nn.Module:
        network = make()
        _draw(network, torch.Generator().manual_seed(seed))
        return network

    return drawn


def _draw(network: nn.Module, generator: torch.Generator) -> None:
    """Draws the parameters of layers anew, and scales the others."""
    of_layers: set[int] = set()
    for module in network.modules():
        if not isinstance(module, WeightLayer | BatchNorm):
            continue
        _draw_layer(module, generator)
        for parameter in module.parameters(recurse=False):
            of_layers.add(id(parameter))
    for parameter in network.parameters():  # what its code does with others is not known
        if id(parameter) in of_layers:
            continue
        if not parameter.is_floating_point():
            continue
        factor = torch.rand(parameter.shape, generator=generator)
        parameter.mul_(0.5 + factor.to(parameter))


def _draw_layer(layer: WeightLayer | BatchNorm, generator: torch.Generator) -> None:
    if layer.weight is not None:
        of_one_row = layer.weight[0].numel()
        _redraw(layer.weight, generator, scale=of_one_row**-0.5)
    if layer.bias is not None:  # small, so that inputs decide what a ReLU lets through
        _redraw(layer.bias, generator, scale=_BIAS)
    if isinstance(layer, BatchNorm):
        _draw_statistics(layer, generator)


def _draw_statistics(norm: BatchNorm, generator: torch.Generator) -> None:
    mean = norm.running_mean
    variance = norm.running_var
    if mean is None:
        return
    assert variance is not None
    drawn = torch.randn(mean.shape, generator=generator)
    mean.copy_(drawn * _BIAS)
    drawn = torch.rand(variance.shape, generator=generator)
    variance.copy_(0.5 + drawn)


def _redraw(parameter: Tensor, generator: torch.Generator, scale: float) -> None:
    """Draws a parameter anew where it is not zero."""
    drawn = torch.randn(parameter.shape, generator=generator)
    values = drawn.to(parameter) * scale
    nonzero = parameter != 0
    parameter.copy_(torch.where(nonzero, values, 0))


def _zeroed(network: nn.Module, groups: list[ChannelGroup], units: dict[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode in which those units are zero."""
    zeroed = _plain_copy(network).eval()
    parameters = dict(zeroed.named_parameters(remove_duplicate=False))
    for group in groups:
        if group.name not in units:
            continue
        group.zero(parameters, units[group.name])
    return zeroed


def _rightly_removed(
    names: list[str], right: Callable[[list[str]], bool], *, known_wrong: bool = False
) -> list[str]:
    """Those groups that can go together, found by halving: most are right, so that few networks are
    looked at. With `known_wrong`, not all of them can."""
    if not names:
        return names
    if not known_wrong and right(names):
        return names
    if len(names) == 1:
        return []
    middle = len(names) // 2
    first = _rightly_removed(names[:middle], right)
    second = _rightly_removed(names[middle:], right)
    both = first + second
    if not first or not second:
        return both
    are_all = len(both) == len(names)
    all_wrong = known_wrong and are_all
    if not all_wrong and right(both):
        return both
    return max(first, second, key=len)
