"""Channel sparsity: pushes channels to zero in all layers that share them, and heads of attention;
compaction removes them.

Group lasso (Yuan, Lin 2006, Model selection and estimation in regression with grouped variables,
eq. 2.1) with one group per unit of `channels.channel_groups` and `heads.head_groups`: its rows in
every layer that writes it, biases and batch norms too. They become 0 in the same step or not at
all, whatever share of the unit's norm they have: weights in front of a batch norm have no size of
their own.

Yuan and Lin weigh a group by the root of its size, so that one strength suits small and large
groups. Size is counted in rows of weights here, not in entries: initialisation makes a row of any
fan-in about as long (He et al. 2015, arXiv 1502.01852), so a unit's norm grows with the root of the
number of its rows. With entries, rows of the largest fan-in would go first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties.base import (
    PENALTIES,
    ActiveGroups,
    GroupPenalty,
    ParameterRef,
    Tensors,
    parameter_ref,
    root,
    shrink_factor,
)
from slimfront.trainables.structure.channel_groups import UnitGroup
from slimfront.trainables.structure.graph import rows
from slimfront.trainables.structure.head_groups import head_groups
from slimfront.trainables.structure.removable import removable_units


@dataclass(frozen=True)
class Units:
    """The parameters that write the units of one group, each with the unit of each row; −1: none of
    this group. `axes` say where the rows of each lie."""

    parameters: tuple[ParameterRef, ...]
    axes: tuple[int, ...]
    owners: tuple[Tensor, ...]
    units: int
    weight: Tensor
    """√(rows of weights that write a unit), a scalar."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, as they are now; views of those whose rows do not lie along the first
        axis, where they do."""
        found = []
        for parameter, axis in zip(self.parameters, self.axes, strict=True):
            tensor = parameter.tensor
            if axis:
                tensor = tensor.movedim(axis, 0)
            found.append(tensor)
        return tuple(found)

    def norm(self) -> Tensor:
        """The penalty of the group, a scalar."""
        norms = unit_norms(self.tensors, self.owners, self.units)
        total = norms.sum()
        return self.weight * total

    def shrink(self, threshold: Tensor) -> None:
        """The proximal step of `threshold` · penalty, in place."""
        tensors = self.tensors
        weighted = threshold * self.weight
        shrunk = shrink_units(tensors, self.owners, self.units, weighted)
        for tensor, smaller in zip(tensors, shrunk, strict=True):
            tensor.copy_(smaller)


def unit_norms(tensors: Tensors, owners: Tensors, units: int) -> Tensor:
    """ℓ2 norms of units over their rows in several tensors: (rows, …) each, with owners (rows,), to
    (units,).

    The gradient of a unit that is 0 is 0.
    """
    places = units + 1  # the last one takes what has no owner: −1
    first = tensors[0]
    squares = first.new_zeros(places)
    for tensor, owner in zip(tensors, owners, strict=True):
        of_rows = _squares_of_rows(tensor)
        place_of_rows = owner % places
        squares = squares.index_add(0, place_of_rows, of_rows)
    of_units = squares[:units]
    return root(of_units)


def _squares_of_rows(tensor: Tensor) -> Tensor:
    if tensor.dim() <= 1:
        return tensor**2
    entries = tensor.flatten(1)
    return entries.square().sum(1)


def shrink_units(tensors: Tensors, owners: Tensors, units: int, threshold: Tensor) -> list[Tensor]:
    """Proximal operator of `threshold` · Σ ‖unit‖₂: every row of a unit times max(0, 1 − threshold
    / ‖unit‖).

    Shapes as in `unit_norms`; `threshold` is η·λ·weight, a scalar ≥ 0. Rows without an owner stay.
    NaN in, NaN out.
    """
    norms = unit_norms(tensors, owners, units)
    factors = shrink_factor(norms, threshold)
    without_owner = factors.new_ones(1)
    factors = torch.cat([factors, without_owner])
    places = units + 1
    shrunk = []
    for tensor, owner in zip(tensors, owners, strict=True):
        place_of_rows = owner % places
        of_rows = factors[place_of_rows]
        factor = rows(of_rows, tensor)
        smaller = tensor * factor
        shrunk.append(smaller)
    return shrunk


@PENALTIES.register("channel")
class ChannelSparsity(GroupPenalty):
    """Channel sparsity; `strength` is λ. It acts on channels that can be removed, named by
    their first layer, and on heads.

    Take it, and not `node`, where layers share channels by residual additions, concatenations,
    grouped or depthwise convolutions.
    """

    nothing_to_do = "there is no channel and no head in this network that can be removed"

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Units]:
        found: list[UnitGroup] = []
        try:
            found += removable_units(model, sample)
            found += head_groups(model)
        except UserError as error:
            raise UserError(f"penalties.channel: {error}; leave it out, or take node") from error
        groups = {}
        for group in found:
            groups[group.name] = _units(group, model)
        return ActiveGroups(self, groups, Units.norm, Units.shrink)


def _units(group: UnitGroup, model: nn.Module) -> Units:
    parameters = []
    axes = []
    owners = []
    rows_of_weights = 0
    for name, own in group.writers.items():
        parameter = parameter_ref(model, name)
        device = parameter.tensor.device
        parameters.append(parameter)
        axes.append(group.axes.get(name, 0))
        owners.append(own.to(device))
        _, _, leaf = name.rpartition(".")
        if "weight" in leaf:
            has_owner = own >= 0
            rows_of_weights += int(has_owner.sum())
    rows_of_unit = max(rows_of_weights / group.units, 1.0)
    first = parameters[0].tensor
    weight = first.new_tensor(rows_of_unit).sqrt()
    return Units(
        parameters=tuple(parameters),
        axes=tuple(axes),
        owners=tuple(owners),
        units=group.units,
        weight=weight,
    )
