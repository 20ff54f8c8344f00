"""Convolutions, also transposed ones and those of groups: which units they read and write."""

from typing import Any

from torch import Tensor, nn

from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
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


MODULES: dict[type[nn.Module], Handler] = dict.fromkeys((*_CONVS, *_TRANSPOSED), conv)
