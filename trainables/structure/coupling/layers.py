"""Linear layers, embeddings and norms: which units they read and write, and when it changes nothing
that a unit which they read goes."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.counting import CountingGroupNorm, CountingNorm
from slimfront.trainables.structure.coupling.known import Known
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.structure.graph import BatchNorm


def linear(walk: Walk, call: Call) -> Any:
    """(…, in) to (…, out)."""
    layer = layer_of(walk, call)
    known = call.input
    last = known.last_axis
    read, rest = layer.split(known, last)
    zero_in = known.zero_along(last)
    weight = layer.module.weight
    unused = ~weight.any(0)
    layer.reads(read, axis=1, harmless=zero_in | unused)
    written = layer.writes()
    feeding = weight[:, ~zero_in]
    unfed = ~feeding.any(1)
    return layer.output(
        rest,
        axis=last,
        written=written,
        zero=unfed & layer.has_no_bias(),
    )


def bilinear(walk: Walk, call: Call) -> Any:
    """(…, in1) and (…, in2) to (…, out)."""
    layer = layer_of(walk, call)
    first, second = call.args[:2]
    weight = layer.module.weight  # (out, in1, in2)
    used = weight.any(0)
    _reads_side(layer, first, axis=1, used=used.any(1))
    _reads_side(layer, second, axis=2, used=used.any(0))
    written = layer.writes()
    unfed = ~weight.flatten(1).any(1)
    return layer.output(
        Known(second.shape),
        axis=first.last_axis,
        written=written,
        zero=unfed & layer.has_no_bias(),
    )


def _reads_side(layer: CalledLayer, known: Known, axis: int, used: Tensor) -> None:
    """Notes the units that a bilinear layer reads of one side, along this axis of its weight."""
    last = known.last_axis
    read, _ = layer.split(known, last)
    zero_in = known.zero_along(last)
    layer.reads(read, axis, harmless=zero_in | ~used)


def embedding(walk: Walk, call: Call) -> Any:
    """(…) whole numbers to (…, width); of a bag of them, a sum, mean or maximum."""
    layer = layer_of(walk, call)
    walk.stay((call.args, call.kwargs), "they are indices")
    layer.note(None, "weight")
    written = layer.writes(axis=1)
    shape = walk.shape_of(call.node)
    if shape is None:
        return NotImplemented
    made = Known(shape)
    weight = layer.module.weight
    unused = ~weight.any(0)
    return layer.output(
        made,
        axis=made.last_axis,
        written=written,
        zero=unused,
    )


def prelu(walk: Walk, call: Call) -> Any:
    """A slope of each channel's own, or one of all."""
    layer = layer_of(walk, call)
    known = call.input
    if layer.module.num_parameters == 1:
        return known
    known = layer.without_positions(known, 1)
    read, rest = layer.split(known, 1)
    layer.note(read, "weight")
    return layer.output(
        rest,
        axis=1,
        written=read,
        zero=known.zero_along(1),
    )


def channel_norm(walk: Walk, call: Call) -> Any:
    """Batch and instance norms: each channel for itself; the channels are the second axis."""
    layer = layer_of(walk, call)
    module = layer.module
    known = call.input
    axis = min(1, known.last_axis)
    if known.dim == 2 and isinstance(module, nn.InstanceNorm1d):  # without N
        axis = 0
    known = layer.without_positions(known, axis)
    read, rest = layer.split(known, axis)
    layer.note(read, "weight", "bias", "running_mean", "running_var")
    zero_in = known.zero_along(axis)
    return layer.output(
        rest,
        axis=axis,
        written=read,
        zero=_zero_of_channels(module, zero_in),
    )


def _zero_of_channels(norm: Any, zero_in: Tensor) -> Tensor:
    """Where a batch or instance norm makes 0 of a channel, which is 0 itself where `zero_in` says
    so."""
    scale: Tensor | None = norm.weight
    shift: Tensor = torch.zeros(())
    if norm.bias is not None:
        shift = norm.bias
    mean = getattr(norm, "running_mean", None)
    if mean is not None:
        variance = norm.running_var + norm.eps
        scale = variance.rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = shift - mean * scale
    is_constant = zero_in
    if scale is not None:
        is_constant = zero_in | (scale == 0)
    return is_constant & (shift == 0)


def layer_norm(walk: Walk, call: Call) -> Any:
    """Layer and RMS norms over the last axis: channels that are 0 count, and can go if the norm
    knows how many there were."""
    layer = layer_of(walk, call)
    module = layer.module
    known = call.input
    last = known.last_axis
    axes = getattr(module, "normalized_shape", [0])
    if len(axes) != 1:
        layer.keep_all()
        return NotImplemented
    read, rest = layer.split(known, last)
    zero_in = known.zero_along(last)
    _count(layer, read, last, zero_in)
    return layer.output(
        rest,
        axis=last,
        written=read,
        zero=_zero_of_layer_norm(module, zero_in),
    )


def _zero_of_layer_norm(norm: Any, zero_in: Tensor) -> Tensor:
    """Where a layer or RMS norm makes 0 of a channel, which is 0 itself where `zero_in` says
    so."""
    zero = torch.zeros(zero_in.shape, dtype=torch.bool)
    if norm.weight is not None:
        zero = norm.weight == 0
    takes_mean = getattr(norm, "centred", True)
    if isinstance(norm, nn.RMSNorm):
        takes_mean = False
    if not takes_mean:
        zero = zero | zero_in
    bias = getattr(norm, "bias", None)
    if bias is not None:
        zero = zero & (bias == 0)
    return zero


def group_norm(walk: Walk, call: Call) -> Any:
    """Channels that are 0 count in their group, and can go if the norm knows how many there
    were."""
    layer = layer_of(walk, call)
    module = layer.module
    known = layer.without_positions(call.input, 1)
    read, rest = layer.split(known, 1)
    zero_in = known.zero_along(1)
    _count(layer, read, axis=1, zero_in=zero_in)
    zero = torch.zeros(zero_in.shape, dtype=torch.bool)
    if module.affine:
        without_scale = module.weight == 0
        without_shift = module.bias == 0
        zero = without_scale & without_shift
    return layer.output(
        rest,
        axis=1,
        written=read,
        zero=zero,
    )


def _count(layer: CalledLayer, read: Tensor | None, axis: int, zero_in: Tensor) -> None:
    """Notes that a norm counts the channels along an axis, which it reads, and what it has of
    each."""
    if read is not None:
        layer.walk.units.read(read, zero_in)
        layer.walk.count(layer.name, axis, read)
    layer.note(read, "weight", "bias")


MODULES: dict[type[nn.Module], Handler] = {
    nn.Linear: linear,
    nn.Bilinear: bilinear,
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), embedding),
    nn.PReLU: prelu,
    **dict.fromkeys(get_args(BatchNorm), channel_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), channel_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm, CountingNorm), layer_norm),
    **dict.fromkeys((nn.GroupNorm, CountingGroupNorm), group_norm),
}
