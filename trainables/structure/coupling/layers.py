"""Layers with parameters: which units they read and write, and when it changes nothing that a unit
which they read goes."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.structure.counting import CountingGroupNorm, CountingNorm
from slimfront.trainables.structure.coupling.known import Known, compressed, varying
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk, along, mapped_known
from slimfront.trainables.structure.graph import submodule

_READS = "'{}' needs all of them"


def _units_along(walk: Walk, known: Known, axis: int, name: str) -> tuple[Tensor | None, Known]:
    """The units along an axis (size,), None if there are none; and the tensor with its other
    unit_maps."""
    found = known.along(axis)
    rest = Known(known.shape, known.but(axis), known.zero)
    if not found:
        return None, rest
    unit_map = found[0]
    if len(varying(unit_map)) > 1:  # each place along the other axes reads by the same weights
        walk.units.keep(unit_map, _READS.format(name))
        return None, rest
    return unit_map.reshape(-1), rest


def _module(walk: Walk, node: fx.Node) -> Any:
    return submodule(walk.graph, str(node.target))


def _written(walk: Walk, name: str, axis: int, size: int) -> Tensor | None:
    """The units of a parameter's rows: those of an earlier call, or new ones."""
    units = walk.units_of(name, axis)
    if units is None and size > 1:
        units = walk.units.fresh(size)
    return units


def _note(
    walk: Walk, name: str, module: nn.Module, leaf: str, axis: int, units: Tensor | None
) -> None:
    if getattr(module, leaf, None) is not None:
        walk.tensor(f"{name}.{leaf}", axis, units)


def linear(walk: Walk, call: Call) -> Any:
    """(…, in) to (…, out)."""
    module, name = _module(walk, call.node), call.name
    known = call.args[0]
    read, rest = _units_along(walk, known, known.dim - 1, name)
    zero_in = known.zero_along(known.dim - 1)
    weight = module.weight
    if read is not None:
        walk.units.read(read, zero_in | ~weight.any(0))
    walk.tensor(f"{name}.weight", 1, read, reads=True)
    written = _written(walk, f"{name}.weight", 0, len(weight))
    walk.tensor(f"{name}.weight", 0, written)
    _note(walk, name, module, "bias", 0, written)
    zero = ~weight[:, ~zero_in].any(1)
    return _made(walk, call.node, rest, known.dim - 1, written, zero & _no_bias(module))


def _no_bias(module: Any) -> Tensor:
    """Where a layer has no bias, or one of 0: (out,)."""
    if module.bias is None:
        return torch.ones((), dtype=torch.bool)
    found: Tensor = module.bias == 0
    return found


def _made(
    walk: Walk, node: fx.Node, rest: Known, axis: int, written: Tensor | None, zero: Tensor
) -> Any:
    """A layer's output: the units that it writes along an axis, with those of other axes."""
    shape = walk.shape_of(node)
    if shape is None:
        return NotImplemented
    unit_maps = list(rest.unit_maps)
    if written is not None:
        unit_maps.append(along(written, axis, len(shape)))
    zeros = along(zero.expand(shape[axis]), axis, len(shape))
    return Known(shape, walk.apart(unit_maps)).with_zero(compressed(zeros))


def conv(walk: Walk, call: Call) -> Any:
    """(N, in, …) to (N, out, …), and the same without N."""
    module, name = _module(walk, call.node), call.name
    known = call.args[0]
    axis = known.dim - len(module.kernel_size) - 1
    known = _apart_from_positions(walk, known, axis, name)
    read, rest = _units_along(walk, known, axis, name)
    zero_in = known.zero_along(axis)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        by_group = module.weight.detach().unflatten(0, (module.groups, -1)).flatten(3)
        weight = by_group.any(-1).transpose(1, 2)  # (groups, out, in)
        rows = 1
    else:
        weight = module.weight.detach().flatten(2).any(-1).unflatten(0, (module.groups, -1))
        rows = 0
    fed = weight & ~zero_in.reshape(module.groups, 1, -1)
    zero = ~fed.any(2).reshape(-1) & _no_bias(module)
    if read is not None:
        walk.units.read(read, zero_in | ~weight.any(1).reshape(-1))
    if module.groups == 1:
        written = _conv_units(walk, name, module, read, rows)
    elif weight.shape[1:] == (1, 1):
        written = _depthwise_units(walk, name, module, read)
    else:
        written = _grouped_units(walk, name, module, read, rows)
    return _made(walk, call.node, rest, axis, written, zero)


def _apart_from_positions(walk: Walk, known: Known, axis: int, name: str) -> Known:
    positions = range(axis + 1, known.dim)
    after = [walk.all_or_none_of(c, positions, _READS.format(name)) for c in known.unit_maps]
    return Known(
        known.shape, tuple(unit_map for unit_map in after if unit_map is not None), known.zero
    )


def _conv_units(
    walk: Walk, name: str, module: Any, read: Tensor | None, rows: int
) -> Tensor | None:
    walk.tensor(f"{name}.weight", 1 - rows, read, reads=True)
    written = _written(walk, f"{name}.weight", rows, module.out_channels)
    walk.tensor(f"{name}.weight", rows, written)
    _note(walk, name, module, "bias", 0, written)
    return written


def _depthwise_units(
    walk: Walk, name: str, module: nn.Module, read: Tensor | None
) -> Tensor | None:
    """A channel and what is made of it go together."""
    walk.tensor(f"{name}.weight", 0, read)
    _note(walk, name, module, "bias", 0, read)
    if read is not None:
        walk.groups[name] = (read.reshape(-1, 1), read.reshape(-1, 1))
    return read


def _grouped_units(
    walk: Walk, name: str, module: Any, read: Tensor | None, rows: int
) -> Tensor | None:
    """Each group keeps as many channels as the others, or goes with all that it reads and
    writes."""
    groups = module.groups
    if rows or read is None or name in walk.groups:
        _fixed(walk, name, module, read)
        return None
    written = walk.units.fresh(module.out_channels)
    inputs, outputs = read.reshape(groups, -1), written.reshape(groups, -1)
    walk.units.pack(inputs)
    walk.units.pack(outputs)
    walk.units.same_as_all(walk.units.whole(inputs), outputs)
    walk.groups[name] = (inputs, outputs)
    walk.tensor(f"{name}.weight", 0, written)
    _note(walk, name, module, "bias", 0, written)
    return written


def _fixed(walk: Walk, name: str, module: nn.Module, read: Tensor | None) -> None:
    """Has all of a layer stay."""
    if read is not None:
        walk.units.keep(read, _READS.format(name))
    for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
        for axis in range(tensor.dim()):
            walk.tensor(f"{name}.{leaf}", axis, None)


def embedding(walk: Walk, call: Call) -> Any:
    """(…) whole numbers to (…, width)."""
    module, name = _module(walk, call.node), call.name
    walk.stay(call.args, "they are indices")
    walk.tensor(f"{name}.weight", 0, None)
    written = _written(walk, f"{name}.weight", 1, module.embedding_dim)
    walk.tensor(f"{name}.weight", 1, written)
    shape = walk.shape_of(call.node)
    if shape is None:
        return NotImplemented
    return _made(walk, call.node, Known(shape), len(shape) - 1, written, ~module.weight.any(0))


def bilinear(walk: Walk, call: Call) -> Any:
    """(…, in1) and (…, in2) to (…, out)."""
    module, name = _module(walk, call.node), call.name
    rest = None
    for number, known in enumerate(call.args[:2]):
        read, rest = _units_along(walk, known, known.dim - 1, name)
        weight = module.weight.any(0).any(1 - number)
        if read is not None:
            walk.units.read(read, known.zero_along(known.dim - 1) | ~weight)
        walk.tensor(f"{name}.weight", number + 1, read, reads=True)
    written = _written(walk, f"{name}.weight", 0, module.out_features)
    walk.tensor(f"{name}.weight", 0, written)
    _note(walk, name, module, "bias", 0, written)
    assert rest is not None
    zero = ~module.weight.flatten(1).any(1) & _no_bias(module)
    return _made(walk, call.node, Known(rest.shape), call.args[0].dim - 1, written, zero)


_OF_A_NORM = ("weight", "bias", "running_mean", "running_var")


def channel_norm(walk: Walk, call: Call) -> Any:
    """Batch and instance norms: each channel for itself; the channels are the second axis."""
    module, name = _module(walk, call.node), call.name
    known = call.args[0]
    axis = 1 if known.dim > 1 else 0
    if isinstance(module, nn.InstanceNorm1d) and known.dim == 2:
        axis = 0
    known = _apart_from_positions(walk, known, axis, name)
    read, rest = _units_along(walk, known, axis, name)
    for leaf in _OF_A_NORM:
        _note(walk, name, module, leaf, 0, read)
    shift = torch.zeros(()) if module.bias is None else module.bias
    if getattr(module, "running_mean", None) is not None:
        scale = (module.running_var + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shift = shift - module.running_mean * scale
        zero = (shift == 0) & (known.zero_along(axis) | (scale == 0))
    else:
        nothing = known.zero_along(axis)
        if module.weight is not None:
            nothing = nothing | (module.weight == 0)
        zero = nothing & (shift == 0)
    return _made(walk, call.node, rest, axis, read, zero)


def layer_norm(walk: Walk, call: Call) -> Any:
    """Layer and RMS norms over the last axis: channels that are 0 count, and can go if the norm
    knows how many there were."""
    module, name = _module(walk, call.node), call.name
    known = call.args[0]
    axis = known.dim - 1
    if len(getattr(module, "normalized_shape", [0])) != 1:
        _fixed(walk, name, module, None)
        return NotImplemented
    read, rest = _units_along(walk, known, axis, name)
    zero_in = known.zero_along(axis)
    if read is not None:
        walk.units.read(read, zero_in)
        walk.counts.setdefault(name, []).append((axis, read))
    for leaf in ("weight", "bias"):
        _note(walk, name, module, leaf, 0, read)
    bias = getattr(module, "bias", None)
    zero = torch.ones(known.shape[-1], dtype=torch.bool) if bias is None else bias == 0
    scaled = torch.zeros_like(zero) if module.weight is None else module.weight == 0
    if isinstance(module, nn.RMSNorm) or not getattr(module, "centred", True):
        scaled = scaled | zero_in
    return _made(walk, call.node, rest, axis, read, zero & scaled)


def group_norm(walk: Walk, call: Call) -> Any:
    """Channels that are 0 count in their group, and can go if the norm knows how many there
    were."""
    module, name = _module(walk, call.node), call.name
    known = _apart_from_positions(walk, call.args[0], 1, name)
    read, rest = _units_along(walk, known, 1, name)
    zero_in = known.zero_along(1)
    if read is not None:
        walk.units.read(read, zero_in)
        walk.counts.setdefault(name, []).append((1, read))
    for leaf in ("weight", "bias"):
        _note(walk, name, module, leaf, 0, read)
    zero = torch.zeros(known.shape[1], dtype=torch.bool)
    if module.affine:
        zero = (module.weight == 0) & (module.bias == 0)
    return _made(walk, call.node, rest, 1, read, zero)


def prelu(walk: Walk, call: Call) -> Any:
    """A slope of each channel's own, or one of all."""
    module, name = _module(walk, call.node), call.name
    known = call.args[0]
    if module.num_parameters == 1:
        return known
    read, rest = _units_along(walk, known, 1, name)
    walk.tensor(f"{name}.weight", 0, read)
    return _made(walk, call.node, rest, 1, read, known.zero_along(1))


_GATES = {"LSTM": 4, "GRU": 3}


def recurrent(walk: Walk, call: Call) -> Any:
    """RNN, GRU and LSTM from a state of 0: a hidden unit whose gates have neither weights nor
    biases is 0 all along."""
    module, name = _module(walk, call.node), call.name
    if len(call.args) > 1 or call.kwargs or module.proj_size:
        _fixed(walk, name, module, None)
        return NotImplemented
    known = call.args[0]
    gates = _GATES.get(module.mode, 1)
    ways = ("", "_reverse") if module.bidirectional else ("",)
    read, rest = _units_along(walk, known, known.dim - 1, name)
    zero_in = known.zero_along(known.dim - 1)
    hidden = module.hidden_size
    units = []
    for layer in range(module.num_layers):
        written, zeros = [], []
        for way in ways:
            own = _written_state(walk, name, f"l{layer}{way}", hidden)
            zero = _gates(walk, module, name, f"l{layer}{way}", gates, own, read, zero_in)
            written.append(own)
            zeros.append(zero)
        units += written
        read, zero_in = torch.cat(written), torch.cat(zeros)
    walk.units.pack(torch.stack(units))
    made, ends = walk.made[call.node]
    last = len(made.shape) - 1
    assert read is not None
    out = Known(made.shape, walk.apart([*rest.unit_maps, along(read, last, last + 1)]))
    states = torch.stack(units)  # (layers · ways, hidden)
    if len(made.shape) == 3:
        states = states.unsqueeze(1)
    states_known = mapped_known(ends, lambda end: Known(end.shape, (states,)))
    return out.with_zero(compressed(along(zero_in, last, last + 1))), states_known


def _written_state(walk: Walk, name: str, layer: str, hidden: int) -> Tensor:
    units = walk.units_of(f"{name}.weight_hh_{layer}", 1)
    return walk.units.fresh(hidden) if units is None else units


def _gates(
    walk: Walk,
    module: Any,
    name: str,
    layer: str,
    gates: int,
    own: Tensor,
    read: Tensor | None,
    zero_in: Tensor,
) -> Tensor:
    """Notes the units of a layer's parameters, and what they read; which of its units are 0."""
    inward, across = getattr(module, f"weight_ih_{layer}"), getattr(module, f"weight_hh_{layer}")
    if read is not None:
        walk.units.read(read, zero_in | ~inward.any(0))
    fed = inward[:, ~zero_in].any(1) | across.any(1)
    for leaf in ("bias_ih", "bias_hh"):
        if module.bias:
            fed = fed | (getattr(module, f"{leaf}_{layer}") != 0)
            walk.tensor(f"{name}.{leaf}_{layer}", 0, own.repeat(gates))
    zero: Tensor = ~fed.reshape(gates, -1).any(0)
    walk.units.read(own, zero | ~across.any(0))
    walk.tensor(f"{name}.weight_ih_{layer}", 0, own.repeat(gates))
    walk.tensor(f"{name}.weight_ih_{layer}", 1, read, reads=True)
    walk.tensor(f"{name}.weight_hh_{layer}", 0, own.repeat(gates))
    walk.tensor(f"{name}.weight_hh_{layer}", 1, own, reads=True)
    return zero


def multihead(walk: Walk, call: Call) -> Any:
    """Attention as torch has it: it reads the units of its three inputs, and writes those of its
    output; what lies between stays, or goes by heads."""
    module, name = _module(walk, call.node), call.name
    query, key, value = (call.argument(n, k) for n, k in enumerate(("query", "key", "value")))
    if module.in_proj_weight is not None:
        projections = [("in_proj_weight", side) for side in (query, key, value)]
    else:
        leaves = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        projections = list(zip(leaves, (query, key, value), strict=True))
    for leaf, side in projections:
        read, rest = _units_along(walk, side, side.dim - 1, name)
        walk.stay(rest, _READS.format(name))
        if read is not None:
            unread = ~getattr(module, leaf).any(0)
            walk.units.read(read, side.zero_along(side.dim - 1) | unread)
        walk.tensor(f"{name}.{leaf}", 1, read, reads=True)
    walk.stay([*call.args[3:], *call.kwargs.values()], _READS.format(name))
    written = _written(walk, f"{name}.out_proj.weight", 0, module.embed_dim)
    walk.tensor(f"{name}.out_proj.weight", 0, written)
    _note(walk, f"{name}.out_proj", module.out_proj, "bias", 0, written)
    made, weights = walk.made[call.node]
    last = made.dim - 1
    none = ~module.out_proj.weight.any(1) & _no_bias(module.out_proj)
    unit_maps = () if written is None else (along(written, last, made.dim),)
    out = Known(made.shape, unit_maps)
    return out.with_zero(compressed(along(none, last, made.dim))), weights


MODULES: dict[type[nn.Module], Handler] = {
    nn.Linear: linear,
    nn.MultiheadAttention: multihead,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), channel_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), channel_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm, CountingNorm), layer_norm),
    **dict.fromkeys((nn.GroupNorm, CountingGroupNorm), group_norm),
    nn.Embedding: embedding,
    nn.Bilinear: bilinear,
    nn.PReLU: prelu,
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), recurrent),
}
