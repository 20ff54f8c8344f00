"""Convolutions, also transposed ones and those of groups: which units they read and write; and
those of a weight that is computed, or shared."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from slimfront.trainables.structure.coupling.joining import joined, lined_up
from slimfront.trainables.structure.coupling.known import Known
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.products import added, linear_of
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def conv(walk: Walk, call: Call) -> Any:
    """(N, in, …) to (N, out, …), and the same without N."""
    layer = layer_of(walk, call)
    module = layer.module
    known = call.input
    positions = len(module.kernel_size)
    axis = known.dim - positions - 1
    known = layer.without_positions(known, axis)
    read, rest = layer.split(known, axis)
    zero_in = known.zero_along(axis)
    used = _used(module)
    if read is not None:
        is_used = used.any(1)
        unused = ~is_used.reshape(-1)
        walk.units.read(read, harmless=zero_in | unused)
    written = _written(layer, read, used)
    zero_by_group = zero_in.reshape(module.groups, 1, -1)
    feeding = used & ~zero_by_group
    is_fed = feeding.any(2)
    unfed = ~is_fed.reshape(-1)
    return layer.output(
        rest,
        axis=axis,
        written=written,
        zero=unfed & layer.has_no_bias(),
    )


def _used(module: Any) -> Tensor:
    """Which pairs of channels in each group have a weight that is not 0: (groups, out, in)."""
    weight = module.weight.detach()
    used: Tensor
    if isinstance(module, _TRANSPOSED):  # (in, out, …)
        by_group = weight.unflatten(0, (module.groups, -1))
        weights_of_pairs = by_group.flatten(3)
        used = weights_of_pairs.any(-1)
        return used.transpose(1, 2)
    weights_of_pairs = weight.flatten(2)
    by_channel = weights_of_pairs.any(-1)
    used = by_channel.unflatten(0, (module.groups, -1))
    return used


def _written(layer: CalledLayer, read: Tensor | None, used: Tensor) -> Tensor | None:
    """The units that a convolution writes, which is noted with those that its weight reads."""
    is_transposed = isinstance(layer.module, _TRANSPOSED)
    if layer.module.groups == 1:
        axis_out = 0
        axis_in = 1
        if is_transposed:
            axis_out = 1
            axis_in = 0
        layer.reads(read, axis_in)
        return layer.writes(axis_out)
    channels_in_a_group = used.shape[1:]
    if channels_in_a_group == (1, 1):
        return _depthwise(layer, read)
    was_called_before = layer.name in layer.walk.groups
    if is_transposed or read is None or was_called_before:
        layer.keep_all(read)
        return None
    return _grouped(layer, read)


def _depthwise(layer: CalledLayer, read: Tensor | None) -> Tensor | None:
    """A channel and what is made of it go together."""
    layer.note(read, "weight", "bias")
    if read is not None:
        groups = read.reshape(-1, 1)
        walk = layer.walk
        walk.groups[layer.name] = (groups, groups)
    return read


def _grouped(layer: CalledLayer, read: Tensor) -> Tensor:
    """Each group keeps as many channels as the others, or goes with all that it reads and
    writes."""
    module = layer.module
    walk = layer.walk
    units = walk.units
    written = units.fresh(module.out_channels)
    inputs = read.reshape(module.groups, -1)
    outputs = written.reshape(module.groups, -1)
    units.pack(inputs)
    units.pack(outputs)
    whole_groups = units.whole(inputs)
    units.same_as_all(whole_groups, outputs)
    walk.groups[layer.name] = (inputs, outputs)
    layer.note(written, "weight", "bias")
    return written


def conv_of_weight(walk: Walk, call: Call) -> Any:
    """A convolution whose weight (out, in / groups, …) is computed or shared, of one group, or of a
    group for each channel."""
    given = call.named("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    known = given["input"]
    weight = given["weight"]
    groups = given.get("groups", 1)
    axis = known.dim - weight.dim + 1
    kernel = range(2, weight.dim)
    of_channels = replace(
        weight,
        unit_maps=walk.left_of(weight.unit_maps, kernel, "it is a kernel"),
        zero=weight.zero_over(kernel),
    )
    channels = _without_positions(walk, known, axis)
    matrix = _without_axes_behind(of_channels, 1)
    if groups == 1:
        made = linear_of(walk, channels, matrix, given.get("bias"))
    elif groups == known.shape[axis] == weight.shape[0]:
        made = _one_by_one(walk, channels, matrix, given.get("bias"))
    else:
        return NotImplemented
    return _with_positions(walk, call, made)


def _without_positions(walk: Walk, known: Known, axis: int) -> Known:
    """A tensor whose units go as a whole along the axes behind that of channels, without those."""
    behind = range(axis + 1, known.dim)
    whole = replace(
        known,
        unit_maps=walk.left_of(known.unit_maps, behind, "a convolution goes along them"),
        zero=known.zero_over(behind),
    )
    return _without_axes_behind(whole, axis)


def _without_axes_behind(known: Known, axis: int) -> Known:
    """A tensor with its first axes alone; all that is known is alike along the others."""

    def first_axes(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[: axis + 1])

    zero = known.zero
    if zero is not None:
        zero = first_axes(zero)
    return Known(
        shape=known.shape[: axis + 1],
        unit_maps=tuple(first_axes(unit_map) for unit_map in known.unit_maps),
        zero=zero,
    )


def _one_by_one(walk: Walk, channels: Known, matrix: Known, bias: Known | None) -> Known:
    """(…, channels) times a weight (channels, 1), with what is added."""
    column = _without_axes_behind(matrix, 0)
    made = Known(channels.shape, joined(walk, [channels, column], channels.shape))
    zero = channels.zeros() | lined_up(column, channels.dim).zeros()
    made = made.with_zero(zero)
    if bias is None:
        return made
    return added(walk, made, bias)


def _with_positions(walk: Walk, call: Call, made: Known) -> Known:
    """What a convolution makes, with the axes behind that of channels."""
    shape = walk.made[call.node].shape

    def with_axes_behind(tensor: Tensor) -> Tensor:
        behind = [1] * (len(shape) - tensor.dim())
        return tensor.reshape(*tensor.shape, *behind)

    zero = made.zero
    if zero is not None:
        zero = with_axes_behind(zero)
    unit_maps = [with_axes_behind(unit_map) for unit_map in made.unit_maps]
    return Known(shape=shape, unit_maps=tuple(unit_maps), zero=zero)


CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Along how many axes a function of this name convolves."""
GROUPS_PLACE = 6
"""Where the number of groups stands among the arguments of these functions."""
FUNCTIONS: dict[str, Handler] = dict.fromkeys(CONVOLUTIONS, conv_of_weight)
MODULES: dict[type[nn.Module], Handler] = dict.fromkeys((*_CONVS, *_TRANSPOSED), conv)
