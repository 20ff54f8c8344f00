"""Attention: a head goes as a whole, or some of its width."""

from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.coupling.joining import joined
from slimfront.trainables.structure.coupling.known import Known, along, compressed, varying
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.products import Lettered, contract
from slimfront.trainables.structure.coupling.units import NONE
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk, by_place

_OVER_ALL = "attention goes over all of them"


def attention(walk: Walk, call: Call) -> Any:
    """`scaled_dot_product_attention` of (…, L, d), (…, S, d), (…, S, e): a head
    goes as a whole, or some of its width."""
    module = walk.module(call.node)
    names = ["query", "key", "value", "attn_mask"]
    if module is None:
        names += ["dropout_p", "is_causal"]
    given = call.named(*names)
    is_grouped = call.kwargs.get("enable_gqa", False)
    if isinstance(module, ScaledDotProduct):
        is_grouped = module.enable_gqa
    key, value = given["key"], given["value"]
    if is_grouped:
        heads = given["query"].shape[-3]
        key = _for_each_query(walk, key, heads)
        value = _for_each_query(walk, value, heads)
    return _attended(
        walk,
        query=given["query"],
        key=key,
        value=value,
        mask=given.get("attn_mask"),
    )


def _for_each_query(walk: Walk, known: Known, heads: int) -> Known:
    """Keys or values of fewer heads than queries have, each as often as there are queries to it."""
    *_, own, _, _ = known.shape
    times = heads // own
    return walk.moved(known, lambda entries: entries.repeat_interleave(times, dim=-3))


def _attended(walk: Walk, query: Known, key: Known, value: Known, mask: Known | None) -> Known:
    """What attention makes of queries, keys and values, (…, L, e)."""
    scores = _scores(walk, query, key)
    if isinstance(mask, Known):
        scores = _masked(walk, scores, mask)
    positions = value.dim - 2
    of_values = walk.left_of(
        value.unit_maps,
        axes=[positions],
        why=_OVER_ALL,
    )
    _read_scores(walk, scores.unit_maps, of_values)
    *in_front, _, _ = scores.shape
    *_, rows, _ = query.shape
    *_, width = value.shape
    shape = torch.Size([*in_front, rows, width])
    whatever_the_width = torch.Size([*in_front, rows, 1])
    sides = [
        Known(whatever_the_width, scores.unit_maps),
        Known(shape, of_values),
    ]
    made = Known(shape, joined(walk, sides, shape))
    zero = value.zero_over([-2])
    return made.with_zero(zero)


def _scores(walk: Walk, query: Known, key: Known) -> Known:
    """The scores (…, L, S), as (…, 1, 1): they go as a whole along queries and keys."""
    batch = "abcdefgh"[: query.dim - 2]
    scores = contract(
        walk,
        Lettered(query, batch + "ld"),
        Lettered(key, batch + "sd"),
        out=batch + "ls",
    )
    return _over_all(walk, scores)


def _over_all(walk: Walk, scores: Known) -> Known:
    """Scores, or a mask of them, without the axes of queries and keys."""
    keys = scores.dim - 1
    queries = scores.dim - 2
    in_front = scores.shape[:-2]
    return Known(
        shape=torch.Size([*in_front, 1, 1]),
        unit_maps=walk.left_of(
            scores.unit_maps,
            axes=[keys, queries],
            why=_OVER_ALL,
        ),
    )


def _masked(walk: Walk, scores: Known, mask: Known) -> Known:
    """Scores, to which a mask is added."""
    above = _over_all(walk, mask)
    shape = torch.broadcast_shapes(scores.shape, above.shape)
    return Known(
        shape=shape,
        unit_maps=joined(walk, [scores, above], shape),
    )


def _read_scores(walk: Walk, of_scores: tuple[Tensor, ...], of_values: tuple[Tensor, ...]) -> None:
    """Notes that scores are read by the values alone: they go with the head that they are of."""
    for unit_map in of_scores:
        units = unit_map.reshape(-1)
        never = torch.zeros(units.shape, dtype=torch.bool)
        heads = _heads(walk, unit_map, of_values)
        walk.units.read(
            units,
            harmless=never,
            unless=heads,
        )


def _heads(walk: Walk, unit_map: Tensor, of_values: tuple[Tensor, ...]) -> Tensor:
    """For each head's scores, the unit of that head; it goes if all of the head's values do."""
    axes = varying(unit_map)
    for other in of_values:
        if axes <= varying(other):
            members = by_place(other, axes)
            return walk.units.whole(members)
    count = unit_map.numel()
    return torch.full((count,), NONE)


def own_attention(walk: Walk, call: Call) -> Any:
    """`Attention`, whose heads stand next to each other in the last axis: (N, L, heads · d)."""
    module = walk.module(call.node)
    assert isinstance(module, Attention)

    def split(entries: Tensor) -> Any:
        return entries.unflatten(-1, (module.heads, -1))

    def flattened(entries: Tensor) -> Tensor:
        return entries.flatten(-2)

    sides = []
    for side in call.args[:3]:
        by_head = walk.moved(side, split)
        sides.append(by_head)
    query, key, value = [_swapped(walk, side) for side in sides]
    has_batch = call.input.dim == 3
    if has_batch and not module.batch_first:
        return NotImplemented
    for mask in call.args[3:]:
        walk.stay(mask, "it is a mask of attention")
    made = _attended(
        walk,
        query=query,
        key=key,
        value=value,
        mask=None,
    )
    of_heads = made.along(-3)
    if of_heads:
        units = of_heads[0].reshape(module.heads, -1)
        walk.counts[call.name] = [(0, units)]
    together = _swapped(walk, made)
    return walk.moved(together, flattened)


def _swapped(walk: Walk, known: Known) -> Known:
    """With the axes of heads and of positions swapped."""

    def swapped(entries: Tensor) -> Tensor:
        return entries.transpose(-3, -2)

    return walk.moved(known, swapped)


def multihead(walk: Walk, call: Call) -> Any:
    """Attention as torch has it: it reads the units of its three inputs, and writes those of its
    output; what lies between stays, or goes by heads."""
    layer = layer_of(walk, call)
    _reads_sides(layer, call)
    for others in (call.args[3:], call.kwargs):
        walk.stay(others, layer.why_all_stay)
    projection = layer.module.out_proj
    out = CalledLayer(
        walk,
        node=call.node,
        name=f"{layer.name}.out_proj",
        module=projection,
    )
    written = out.writes()
    made, weights = walk.made[call.node]
    last = made.last_axis
    unit_maps = []
    if written is not None:
        unit_maps.append(along(written, last, made.dim))
    unfed = ~projection.weight.any(1)
    nothing = unfed & out.has_no_bias()
    zero = along(nothing, last, made.dim)
    known = Known(made.shape, tuple(unit_maps))
    return known.with_zero(compressed(zero)), weights


def _reads_sides(layer: CalledLayer, call: Call) -> None:
    """Notes what the projections of queries, keys and values read: each has a weight of its own, or
    a part of one weight."""
    leaves = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if layer.module.in_proj_weight is not None:
        leaves = ["in_proj_weight"] * 3
    for place, name in enumerate(("query", "key", "value")):
        side = call.argument(place, name)
        _projects(layer, side, leaves[place])


def _projects(layer: CalledLayer, side: Known, leaf: str) -> None:
    """Notes the units of an input that one of the projections reads."""
    walk = layer.walk
    last = side.last_axis
    read, rest = layer.split(side, last)
    walk.stay(rest, layer.why_all_stay)
    if read is not None:
        weight = getattr(layer.module, leaf)
        unused = ~weight.any(0)
        zero_in = side.zero_along(last)
        walk.units.read(read, harmless=zero_in | unused)
    name = f"{layer.name}.{leaf}"
    walk.tensor(
        name,
        axis=1,
        units=read,
        reads=True,
    )


MODULES: dict[type[nn.Module], Handler] = {
    nn.MultiheadAttention: multihead,
    Attention: own_attention,
    ScaledDotProduct: attention,
}
FUNCTIONS: dict[str, Handler] = {"scaled_dot_product_attention": attention}
