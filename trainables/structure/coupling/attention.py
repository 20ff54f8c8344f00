"""Attention: a head goes as a whole, or some of its width."""

from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.coupling.joining import joined
from slimfront.trainables.structure.coupling.known import Known, along, compressed, varying
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.products import contract
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk

_OVER_ALL = "attention goes over all of them"


def attention(walk: Walk, call: Call) -> Any:
    """`scaled_dot_product_attention` of (…, L, d), (…, S, d), (…, S, e): a head
    goes as a whole, or some of its width."""
    module = walk.module(call.node)
    names = ["query", "key", "value", "attn_mask"]
    if module is None:
        names += ["dropout_p", "is_causal"]
    given = call.named(*names)
    shares_keys = isinstance(module, ScaledDotProduct) and module.enable_gqa
    if shares_keys or call.kwargs.get("enable_gqa"):
        return NotImplemented
    mask = given.get("attn_mask")
    return _attended(walk, given["query"], given["key"], given["value"], mask)


def _attended(walk: Walk, query: Known, key: Known, value: Known, mask: Known | None) -> Any:
    scores = _scores(walk, query, key)
    if isinstance(mask, Known):
        scores = _masked(walk, scores, mask)
    of_values = walk.left_of(value.unit_maps, [value.dim - 2], _OVER_ALL)
    for unit_map in scores.unit_maps:
        # Scores are read by the values alone: they go with the head that they are of.
        units = unit_map.reshape(-1)
        harmless = torch.zeros(units.shape, dtype=torch.bool)
        heads = _heads(walk, unit_map, of_values)
        walk.units.read(units, harmless, unless=heads)
    in_front = scores.shape[:-2]
    shape = torch.Size([*in_front, query.shape[-2], value.shape[-1]])
    sides = [Known(shape, scores.unit_maps), Known(shape, of_values)]
    made = Known(shape, joined(walk, sides, shape))
    return made.with_zero(value.zero_over([-2]))


def _scores(walk: Walk, query: Known, key: Known) -> Known:
    """The scores (…, L, S), as (…, 1, 1): they go as a whole along queries and keys."""
    batch = "abcdefgh"[: query.dim - 2]
    scores = contract(walk, query, batch + "ld", key, batch + "sd", batch + "ls")
    return _over_all(walk, scores)


def _over_all(walk: Walk, scores: Known) -> Known:
    """Scores, or a mask of them, without the axes of queries and keys."""
    axes = (scores.dim - 1, scores.dim - 2)
    unit_maps = walk.left_of(scores.unit_maps, axes, _OVER_ALL)
    in_front = scores.shape[:-2]
    return Known(torch.Size([*in_front, 1, 1]), unit_maps)


def _masked(walk: Walk, scores: Known, mask: Known) -> Known:
    """Scores, to which a mask is added."""
    above = _over_all(walk, mask)
    shape = torch.broadcast_shapes(scores.shape, above.shape)
    return Known(shape, joined(walk, [scores, above], shape))


def _heads(walk: Walk, unit_map: Tensor, of_values: tuple[Tensor, ...]) -> Tensor:
    """For each head's scores, the unit of that head; it goes if all of the head's values do."""
    axes = sorted(varying(unit_map))
    for other in of_values:
        if varying(unit_map) <= varying(other):
            rest = [axis for axis in range(other.dim()) if axis not in axes]
            by_head = other.permute(*axes, *rest)
            return walk.units.whole(by_head.reshape(unit_map.numel(), -1))
    return torch.full((unit_map.numel(),), NONE)


def own_attention(walk: Walk, call: Call) -> Any:
    """`Attention`, whose heads stand next to each other in the last axis: (N, L, heads · d)."""
    module = walk.module(call.node)
    assert isinstance(module, Attention)
    by_head = []
    for side in call.args[:3]:
        split = walk.moved(side, lambda entries: entries.unflatten(-1, (module.heads, -1)))
        by_head.append(split)
    query, key, value = [_swapped(walk, side) for side in by_head]
    if not module.batch_first and call.input.dim == 3:
        return NotImplemented
    for mask in call.args[3:]:
        walk.stay(mask, "it is a mask of attention")
    made = _attended(walk, query, key, value, None)
    heads = made.along(-3)
    if heads:
        units = heads[0].reshape(module.heads, -1)
        walk.counts[call.name] = [(0, units)]
    together = _swapped(walk, made)
    return walk.moved(together, lambda entries: entries.flatten(-2))


def _swapped(walk: Walk, known: Known) -> Known:
    """With the axes of heads and of positions swapped."""
    return walk.moved(known, lambda entries: entries.transpose(-3, -2))


def multihead(walk: Walk, call: Call) -> Any:
    """Attention as torch has it: it reads the units of its three inputs, and writes those of its
    output; what lies between stays, or goes by heads."""
    layer = layer_of(walk, call)
    module = layer.module
    leaves = ["in_proj_weight"] * 3
    if module.in_proj_weight is None:
        leaves = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    for place, name in enumerate(("query", "key", "value")):
        side = call.argument(place, name)
        _projects(layer, side, leaves[place])
    others = [*call.args[3:], *call.kwargs.values()]
    walk.stay(others, layer.why_all_stay)
    out = CalledLayer(walk, call.node, f"{layer.name}.out_proj", module.out_proj)
    written = out.writes()
    made, weights = walk.made[call.node]
    unit_maps = []
    if written is not None:
        unit_maps.append(along(written, made.last_axis, made.dim))
    unfed = ~module.out_proj.weight.any(1)
    zero = along(unfed & out.has_no_bias(), made.last_axis, made.dim)
    known = Known(made.shape, tuple(unit_maps))
    return known.with_zero(compressed(zero)), weights


def _projects(layer: CalledLayer, side: Known, leaf: str) -> None:
    """Notes the units of an input that one of the projections reads."""
    last = side.last_axis
    read, rest = layer.split(side, last)
    layer.walk.stay(rest, layer.why_all_stay)
    if read is not None:
        unused = ~getattr(layer.module, leaf).any(0)
        layer.walk.units.read(read, side.zero_along(last) | unused)
    layer.walk.tensor(f"{layer.name}.{leaf}", 1, read, reads=True)


MODULES: dict[type[nn.Module], Handler] = {
    nn.MultiheadAttention: multihead,
    Attention: own_attention,
    ScaledDotProduct: attention,
}
FUNCTIONS: dict[str, Handler] = {"scaled_dot_product_attention": attention}
