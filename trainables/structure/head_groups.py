"""The heads of attention as units that go together: with a head's queries, keys and values zero,
nothing of it is left.

Michel et al. 2019, Are sixteen heads really better than one?, arXiv 1905.10650. A head that was
zeroed while training is removed by `compaction.heads`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.channel_groups import UnitGroup, relative_to_mean

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class HeadGroup(UnitGroup):
    """The heads of one `nn.MultiheadAttention`, named as it is; a unit is the rows of a head in
    query, key and value."""

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that make or read its units."""
        return {*self.writers, *self.readers}

    def importance(
        self, of_entry: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum of `of_entry` over what makes and reads each head, relative to the mean:
        (heads,)."""
        (reader,) = self.readers
        read = of_entry(parameters[reader])
        by_head = read.unflatten(1, (self.units, -1))
        total: Tensor = by_head.sum((0, 2))
        for name, owners in self.writers.items():
            written = of_entry(parameters[name])
            rows = written.reshape(len(owners), -1)
            sums = rows.sum(1)
            heads = owners.to(sums.device)
            total = total.index_add(
                dim=0,
                index=heads,
                source=sums,
            )
        return relative_to_mean(total)


def head_groups(network: nn.Module) -> list[HeadGroup]:
    """The heads of all attention that keeps a zero head zero: not with `add_bias_kv`, whose value
    is no row of a projection."""
    found = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if module.bias_v is not None or module.add_zero_attn:
            continue
        found.append(_heads(name, module))
    return found


def _heads(name: str, module: nn.MultiheadAttention) -> HeadGroup:
    reader = f"{name}.out_proj.weight"
    return HeadGroup(
        name=name,
        units=module.num_heads,
        writers=_writers(name, module),
        readers={reader: _head_of_each_row(module)},
        read_axes={reader: 1},
    )


def _head_of_each_row(module: nn.MultiheadAttention) -> Tensor:
    heads = torch.arange(module.num_heads)
    return heads.repeat_interleave(module.head_dim)


def _writers(name: str, module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The head of each row: query, key and value have the same rows, one after another where they
    share a parameter."""
    of_one = _head_of_each_row(module)
    found = {}
    for kind in _PROJECTIONS:
        parameter = getattr(module, kind)
        if parameter is None:
            continue
        times = len(parameter) // len(of_one)
        found[f"{name}.{kind}"] = of_one.repeat(times)
    return found
