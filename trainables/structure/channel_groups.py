"""Channels that can only be removed together, by Torch-Pruning's dependency graph.

Fang et al. 2023, DepGraph: towards any structural pruning, arXiv 2301.12900. A residual addition,
for example, couples the channels of all layers whose outputs are added: channel c of one can go
only with channel c of the others.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.structure.attention import projections
from slimfront.trainables.structure.dependencies import Dependencies, Endless
from slimfront.trainables.structure.graph import BatchNorm, tied_modules
from slimfront.trainables.structure.pruning_internals import PLAIN_OPERATIONS
from slimfront.trainables.tasks.evaluating import evaluating

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class UnitGroup:
    """Units of layers that can be removed one by one."""

    name: str
    """Of the first layer that writes the units."""
    units: int
    writers: dict[str, Tensor]
    """What makes the channels, by parameter name: the unit of each row (rows,) of that parameter;
    −1: none of this group.

    Weights and biases of linear and convolutional layers, and of batch norms: a unit whose rows are
    all 0 is 0.
    """
    axes: dict[str, int] = field(default_factory=dict, kw_only=True)
    """Along which axis those rows lie, of parameters where that is not the first one: of
    embeddings, say, and of transposed convolutions."""
    readers: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """What reads the units, by parameter name: the unit of each column (columns,) of it; −1: none
    of this group."""
    read_axes: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    """Along which axis those columns lie."""

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that make its units."""
        return set(self.writers)

    def columns(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape of that parameter with its columns along the first axis: a view."""
        return tensor.movedim(self.read_axes[name], 0)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape of that parameter with its rows along the first axis: a view."""
        axis = self.axes.get(name, 0)
        if axis == 0:
            return tensor
        return tensor.movedim(axis, 0)

    def alive(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Which units have a row that is not all 0: (units,) bool."""
        alive = torch.zeros(self.units, dtype=torch.bool)
        for name, owners in self.writers.items():
            parameter = parameters[name].detach()
            rows = self.rows(name, parameter.cpu())
            flat = rows.reshape(len(rows), -1)
            is_alive = flat.any(1)
            is_of_a_unit = owners >= 0
            of_alive = owners[is_alive & is_of_a_unit]
            alive[of_alive] = True
        return alive

    @torch.no_grad()
    def zero(self, parameters: Mapping[str, Tensor], units: Tensor) -> None:
        """Sets the rows of these units (units,) bool to 0, in place."""
        for name, owners in self.writers.items():
            is_of_a_unit = owners >= 0
            some_unit = owners.clamp(min=0)
            is_theirs = units[some_unit] & is_of_a_unit
            rows = self.rows(name, parameters[name])
            places = is_theirs.to(rows.device)
            rows[places] = 0


def relative_to_mean(importance: Tensor) -> Tensor:
    """The importances of units relative to their mean."""
    smallest = torch.finfo(importance.dtype).tiny
    mean = importance.mean()
    return importance / mean.clamp_min(smallest)


@dataclass(frozen=True)
class ChannelGroup(UnitGroup):
    """Units of channels, each of which can be removed from every layer that writes or reads it.

    A unit is one channel; where a grouped convolution ties them together, one channel of each of
    its groups.
    """

    root: nn.Module
    channels: int
    dependencies: torch_pruning.Group
    """What Torch-Pruning's importances are taken of: (channels,) each, see `per_unit`."""

    def per_unit(self, of_channels: Tensor) -> Tensor:
        """The mean over the channels of each unit: (channels,) to (units,)."""
        return of_channels.view(-1, self.units).mean(0)


def channel_groups(
    network: nn.Module, inputs: Tensor, endless: list[str] | None = None
) -> list[ChannelGroup]:
    """The groups whose units can be removed without changing the shape of the network's output, in
    order of execution.

    Groups with layers that do not keep zero channels apart from the others, such as a layer norm,
    are left out.

    Args:
        network: it is run once on `inputs`, in evaluation mode; frozen parameters count too.
        inputs: (N, *input_shape), N ≥ 1.
        endless: gets the names of layers that are left out since no end is found of what goes with
            their channels.

    Raises:
        UserError: if Torch-Pruning cannot analyse the network.
    """
    if endless is None:
        endless = []
    try:
        with _with_gradients(network):
            graph = _graph(network, inputs)
        groups = _groups(network, graph, endless)
        _let_go(graph)
    except Exception as error:  # Torch-Pruning raises many kinds on a network that it does not know
        said = first_line(error)
        raise UserError(
            f"Torch-Pruning cannot analyse the network, to find which channels go together ({said})"
        ) from error
    return groups


@contextmanager
def _with_gradients(network: nn.Module) -> Iterator[None]:
    """Within, frozen parameters have gradients, by which Torch-Pruning follows a network."""
    frozen = []
    for parameter in network.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            frozen.append(parameter)
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def remove_units(network: nn.Module, inputs: Tensor, dead: dict[str, Tensor]) -> None:
    """Takes units out of a network, in place: `dead` has the units (units,) bool by the name of
    their group."""
    graph = _graph(network, inputs)
    for group in _groups(network, graph, endless=[]):
        if group.name not in dead:
            continue
        places = dead[group.name].nonzero()
        units = places.flatten().tolist()
        if not units:
            continue
        channels = []
        for start in range(0, group.channels, group.units):
            for unit in units:
                channels.append(start + unit)
        graph.update()
        pruning = graph.get_pruning_group(
            group.root,
            pruning_fn=_out(graph, group.root),
            idxs=channels,
        )
        pruning.prune()


def _graph(network: nn.Module, inputs: Tensor) -> Dependencies:
    with evaluating(network), torch.enable_grad():
        # As a tuple: with a bare tensor Torch-Pruning first calls the network with each example as
        # an argument of its own.
        graph = Dependencies()
        with warnings.catch_warnings():
            # Of recurrent layers, whose units it does not follow, and we do.
            warnings.filterwarnings("ignore", message="Maximum recursive depth")
            graph.build_dependency(
                network,
                example_inputs=(inputs[:1].clone(),),
                verbose=False,
            )
        return graph


def _let_go(graph: Dependencies) -> None:
    """Drops the operations of autograd that the graph was read from, which nothing needs any more.

    They hold on to nodes that later backward passes would use too, bound to the stream of today: no
    other could be recorded.
    """
    for pair in graph.module2node.items():
        for holder in pair:
            operation = getattr(holder, "grad_fn", None)
            if operation is not None:
                holder.grad_fn = None


def _out(graph: Dependencies, layer: nn.Module) -> Any:
    pruner = graph.get_pruner_of_module(layer)
    return pruner.prune_out_channels


def _groups(network: nn.Module, graph: Dependencies, endless: list[str]) -> list[ChannelGroup]:
    """The groups in order of execution; the layers where no end is found are added to `endless`."""
    names = {id(module): name for name, module in network.named_modules()}
    order = list(names.values())
    within_heads = projections(network)  # heads go whole, by `compaction.heads`
    tied = {network.get_submodule(name) for name in tied_modules(network)}
    found = {}
    for dependencies in _all_dependencies(graph, names, endless):
        layers = [item.dep.layer for item in dependencies]
        first = layers[0]
        if first in within_heads:
            continue
        if not tied.isdisjoint(layers):
            continue
        group = _group(graph, dependencies, names)
        if group is not None:
            found[group.name] = group
    return [found[name] for name in order if name in found]


def _all_dependencies(
    graph: Dependencies, names: dict[int, str], endless: list[str]
) -> Iterator[torch_pruning.Group]:
    """What goes with all outputs of each layer, once for the layers that go together; a layer where
    no end is found is left out."""
    seen: set[int] = set()
    for module in list(graph.module2node):
        if not isinstance(module, _WEIGHT_LAYERS):
            continue
        if id(module) in seen:
            continue
        pruner = graph.get_pruner_of_module(module)
        if pruner is None:
            continue
        channels = pruner.get_out_channels(module)
        if channels is None:
            continue
        try:
            group = graph.get_pruning_group(
                module,
                pruning_fn=pruner.prune_out_channels,
                idxs=list(range(channels)),
            )
        except Endless:
            name = names[id(module)]
            endless.append(name)
            continue
        for item in group:
            if graph.is_out_channel_pruning_fn(item.dep.pruning_fn):
                seen.add(id(item.dep.layer))
        yield group


def _group(
    graph: Dependencies, dependencies: torch_pruning.Group, names: dict[int, str]
) -> ChannelGroup | None:
    """The group of channels that go together; None where they cannot go."""
    first = dependencies[0]
    root = first.dep.layer
    channels = len(first.idxs)
    tied = 1
    for item in dependencies:
        if not _can_lose_channels(graph, item):
            return None
        tied = max(tied, _tied_channels(item.dep.layer))
    if channels % tied:
        return None
    units = channels // tied
    writers: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}
    for item in dependencies:
        layer = item.dep.layer
        name = names.get(id(layer), "")
        writes = graph.is_out_channel_pruning_fn(item.dep.pruning_fn)
        if writes and isinstance(layer, (*_WEIGHT_LAYERS, BatchNorm)):
            if not _own(writers, item, name, units):
                return None
        elif not writes and isinstance(layer, _WEIGHT_LAYERS):
            _note_reader(readers, item, name, units)
    return ChannelGroup(
        name=names[id(root)],
        units=units,
        writers=writers,
        root=root,
        channels=channels,
        dependencies=dependencies,
        readers=readers,
        read_axes=dict.fromkeys(readers, 1),
    )


def _note_reader(readers: dict[str, Tensor], item: Any, name: str, units: int) -> None:
    """Notes in `readers` which unit each column of a layer's weight reads. A column of a grouped
    convolution reads a channel of each of its groups: one whose channels are of several units is
    left out."""
    if None in item.root_idxs:
        return
    parameter = f"{name}.weight"
    _, width, *_ = item.dep.layer.weight.shape
    columns = torch.tensor(item.idxs) % width
    of_columns = torch.tensor(item.root_idxs) % units
    owners = torch.full((width,), -1)
    if parameter in readers:
        owners = readers[parameter].clone()
    owners[columns] = of_columns
    of_one_unit = torch.equal(owners[columns], of_columns)
    if of_one_unit:
        readers[parameter] = owners


def _can_lose_channels(graph: Dependencies, item: Any) -> bool:
    """Whether a layer is of a known kind, and its channels are not those of the output."""
    makes_them = graph.is_out_channel_pruning_fn(item.dep.pruning_fn)
    if makes_them and not item.dep.target.outputs:
        return False
    known = (*_WEIGHT_LAYERS, BatchNorm, *PLAIN_OPERATIONS)
    return isinstance(item.dep.layer, known)


def _tied_channels(layer: nn.Module) -> int:
    """How many channels of a layer only go together: one of each group of a grouped convolution."""
    groups: int = getattr(layer, "groups", 1)
    if groups == 1:
        return 1
    inputs = getattr(layer, "in_channels", 1)
    outputs = getattr(layer, "out_channels", 1)
    is_depthwise = groups >= outputs and inputs == outputs
    if is_depthwise:
        return 1
    return groups


def _own(writers: dict[str, Tensor], item: Any, name: str, units: int) -> bool:
    """Notes in `writers` which unit each entry of a layer's parameters is of; whether all are of
    one."""
    if None in item.root_idxs:
        return False
    channels = torch.tensor(item.idxs)
    unit_of_channels = torch.tensor(item.root_idxs) % units
    for kind in ("weight", "bias"):
        parameter = getattr(item.dep.layer, kind)
        if parameter is None:
            continue
        if not isinstance(parameter, nn.Parameter):  # it is computed anew in each forward
            return False
        if max(item.idxs) >= len(parameter):  # a norm of another axis
            return False
        no_unit = torch.full((len(parameter),), -1)
        owners = writers.setdefault(f"{name}.{kind}", no_unit)
        owners[channels] = unit_of_channels
    return True
