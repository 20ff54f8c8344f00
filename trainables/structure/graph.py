"""What is known about a network's structure, found by tracing it with torch.fx."""

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.structure import operations
from slimfront.trainables.structure.copying import left_as_it_was
from slimfront.trainables.structure.encoders import Tracer
from slimfront.trainables.structure.exported import CannotExport, exported, writes_elsewhere
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import is_check

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
WeightLayer = nn.Linear | Conv
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_RANK = "rank"
"""Where a node says how many axes its output has."""

_RELUS: tuple[object, ...] = (nn.ReLU, torch.relu, F.relu, "relu", "relu_")
_ADDITIONS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_SHAPES: tuple[object, ...] = (
    nn.Flatten,
    torch.flatten,
    "flatten",
    "view",
    "reshape",
    "contiguous",
)
# Dropout's outputs are its inputs, zeroed or scaled up; pooling takes means and maxima. All of them
# keep a sign.
_SIGN_KEEPERS: tuple[object, ...] = (
    *_SHAPES,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    F.dropout,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool3d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool3d,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
)
_ROUNDING_EPS = 16
"""Negative entries of a folded layer down to this many machine epsilons of its largest entry are
rounding errors of folding."""


_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def trace(model: nn.Module, sample: Tensor | None = None) -> fx.GraphModule:
    """The graph of a network; it shares the network's modules and parameters.

    With a `sample` (N, *input_shape) it is also known of how many axes the outputs are, as
    `note_ranks` finds out; and a network that torch.fx cannot trace is exported, as it is in
    evaluation mode.

    Raises:
        UserError: if the network's forward cannot be traced (data-dependent control flow, say).
    """
    if isinstance(model, fx.GraphModule):
        traced: fx.GraphModule = model
    else:
        with left_as_it_was(model):
            traced = _traced(model, sample)
    if sample is not None:
        note_ranks(traced, sample)
    return traced


def _traced(model: nn.Module, sample: Tensor | None) -> fx.GraphModule:
    traced: fx.GraphModule | None = None
    try:
        tracer = Tracer()
        graph = _without_checks(_without_defaults(tracer.trace(model, _defaults(model))))
        traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
        reason: Exception | None = None
    except Exception as error:
        reason = error
    if sample is not None and (traced is None or not _is_known(traced)):
        try:
            return exported(model, sample)
        except CannotExport as error:
            reason = reason and error
    if traced is not None:
        return traced
    raise UserError(
        f"{type(model).__name__}.forward cannot be traced ({reason}); "
        "layer, node and block penalties and compaction need a forward without data-dependent "
        "control flow"
    ) from reason


def _is_known(traced: fx.GraphModule) -> bool:
    """Whether all that a network's code calls is known: what torch.fx takes for one call can be a
    function of a library, which is of other operations."""
    return not writes_elsewhere(traced) and all(
        node.op != "call_function"
        or operations.name_of(node.target) is not None
        or (node.target is getattr and node.args[1] in operations.ATTRIBUTES)
        for node in traced.graph.nodes
    )


def _without_checks(graph: fx.Graph) -> fx.Graph:
    """Takes out checks that nothing reads."""
    for node in reversed(graph.nodes):
        if is_check(node) and not node.users:
            graph.erase_node(node)
    return graph


class _Ranks(fx.Interpreter):
    """Runs a graph and notes in each node how many axes its output has."""

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        n.meta[_RANK] = made.dim() if isinstance(made, Tensor) else None
        return made


def note_ranks(graph: fx.GraphModule, inputs: Tensor) -> None:
    """Notes in each node how many axes its output has for these inputs (N, *input_shape): linear
    layers take any number.

    What cannot be run has no ranks: whoever runs the network says why.
    """
    unknown = suppress(RuntimeError, ValueError, IndexError, TypeError)
    with unknown, evaluating(graph), torch.no_grad(), torch.random.fork_rng(devices=[]):
        _Ranks(graph).run(inputs[:2].clone())


def _defaults(model: nn.Module) -> dict[str, object] | None:
    """The optional arguments of a network's forward, which get inputs alone: they are what they are
    when left out."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty} or None


def _without_defaults(graph: fx.Graph) -> fx.Graph:
    """Takes out what torch.fx keeps of optional arguments: placeholders, and checks that they are
    what they were."""
    optional = [node for node in graph.nodes if node.op == "placeholder"][1:]
    for node in optional:
        checks = [user for user in _descendants(node) if not user.users]
        if all(is_check(check) for check in checks):
            for user in reversed(_descendants(node)):
                graph.erase_node(user)
            graph.erase_node(node)
    return graph


def _descendants(node: fx.Node) -> list[fx.Node]:
    """What depends on a node, in the order of the graph."""
    found = {node}
    for other in node.graph.nodes:
        if found.intersection(other.all_input_nodes):
            found.add(other)
    return [other for other in node.graph.nodes if other in found and other is not node]


def module_of(graph: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls, or None if it does not call one."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return submodule(graph, str(node.target))


def submodule(graph: fx.GraphModule, name: str) -> nn.Module:
    """The module of that name, as `get_submodule` gives it, which takes ten times as long."""
    module: nn.Module | None = graph
    for part in name.split("."):
        assert module is not None
        module = getattr(module, part)
    assert module is not None
    return module


def calls(graph: fx.GraphModule, node: object, kinds: tuple[object, ...]) -> bool:
    """Whether a node calls one of `kinds`: types of modules, functions, or names of tensor
    methods."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(module_of(graph, node), _types(kinds))
    return node.op in ("call_function", "call_method") and node.target in kinds


@functools.cache
def _types(kinds: tuple[object, ...]) -> tuple[type, ...]:
    return tuple(kind for kind in kinds if isinstance(kind, type))


def is_relu(graph: fx.GraphModule, node: object) -> bool:
    """Whether the node applies a ReLU."""
    return calls(graph, node, _RELUS)


def is_addition(graph: fx.GraphModule, node: object) -> bool:
    """Whether the node adds two outputs of the network."""
    plain = isinstance(node, fx.Node) and not node.kwargs  # torch.add has a factor, `alpha`
    return (
        plain
        and calls(graph, node, _ADDITIONS)
        and sum(isinstance(a, fx.Node) for a in _args(node)) == 2
    )


def is_flatten(graph: fx.GraphModule, node: object) -> bool:
    """Whether the node only changes the shape."""
    return calls(graph, node, _SHAPES)


def weight_layer(graph: fx.GraphModule, node: object) -> WeightLayer | None:
    """The linear or (ungrouped) convolutional layer that the node calls, if it does."""
    module = module_of(graph, node)
    if isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1):
        return module
    return None


def batch_norm(graph: fx.GraphModule, node: object) -> BatchNorm | None:
    """The batch norm with running statistics that the node calls, if it does."""
    module = module_of(graph, node)
    if isinstance(module, BatchNorm) and module.running_mean is not None:
        return module
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this node's output, or None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def call_counts(graph: fx.GraphModule) -> Counter[object]:
    """How often each module is called, by name: one that is called twice cannot be changed for one
    place only.

    Nor can one whose parameters another module, or the network's own code, holds too: it counts as
    called twice.
    """
    counts = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    for name in tied_modules(graph):
        if counts[name]:
            counts[name] += 1
    return counts


def tied_modules(network: nn.Module) -> set[str]:
    """The names of the modules that hold a parameter which others hold too, by identity."""
    holders: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in holders.values() if len(names) > 1 for name in names}


@dataclass(frozen=True)
class Layer:
    """A weight layer, with the batch norm behind it if there is one: what would be one layer once
    folded."""

    name: str
    layer: WeightLayer
    norm: BatchNorm | None
    node: fx.Node
    last: fx.Node
    """The node of the batch norm, or of the layer itself."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, as they are now, with those of the batch norm."""
        found = [self.layer.weight, self.layer.bias]
        if self.norm is not None:
            found += [self.norm.weight, self.norm.bias]
        return tuple(tensor for tensor in found if tensor is not None)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in, …) and bias (out) as if the batch norm were folded in,
        differentiable."""
        weight = self.layer.weight
        bias = self.layer.bias if self.layer.bias is not None else weight.new_zeros(weight.shape[0])
        if self.norm is None:
            return weight, bias
        scale, shift = self._scale_and_shift()
        return weight * rows(scale, weight), bias * scale + shift

    @torch.no_grad()
    def write_folded(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the parameters so that `folded` gives these; zeros of `weight` stay exactly zero.

        A row whose batch norm scales by 0 is left alone. Without a bias or a batch norm, `bias` is
        not written.
        """
        if self.norm is None:
            self.layer.weight.copy_(weight)
            if self.layer.bias is not None:
                self.layer.bias.copy_(bias)
            return
        scale, shift = self._scale_and_shift()
        alive = scale != 0
        unscaled = weight / rows(torch.where(alive, scale, 1), weight)
        self.layer.weight.copy_(torch.where(rows(alive, weight), unscaled, self.layer.weight))
        old = self.layer.bias * scale + shift if self.layer.bias is not None else shift
        self.norm.bias.add_(torch.where(alive, bias - old, 0))

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiplies the folded rows [W | b] by `factors` (out), through the batch norm's affine
        part if there is one.

        Scaling the weights in front of a batch norm would do nothing: it normalises them again in
        the next batch.
        """
        if self.norm is not None:
            self.norm.weight.mul_(factors)
            self.norm.bias.mul_(factors)
            return
        self.layer.weight.mul_(rows(factors, self.layer.weight))
        if self.layer.bias is not None:
            self.layer.bias.mul_(factors)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        assert norm is not None and norm.running_var is not None and norm.running_mean is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return scale, norm.bias - norm.running_mean * scale

    def active(self) -> Tensor:
        """Whether the folded [W | b] has a negative entry beyond rounding (arXiv 2006.15604,
        section 2); a boolean scalar."""
        with torch.no_grad():
            weight, bias = self.folded()
            return has_negative_entry(weight, bias, exact=self.norm is None)


def rows(per_row: Tensor, weight: Tensor) -> Tensor:
    """(out) reshaped so that it broadcasts over the rows of a weight (out, in, …)."""
    return per_row.view(-1, *[1] * (weight.dim() - 1))


def has_negative_entry(weight: Tensor, bias: Tensor, *, exact: bool = True) -> Tensor:
    """Whether [W | b] has a negative entry; without `exact`, one beyond `rounding`. A boolean
    scalar."""
    lowest = torch.minimum(weight.min(), bias.min())
    return lowest < (0 if exact else -rounding(weight, bias, weight.dtype))


def rounding(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """How far folding in `dtype` may be off in an entry of this [W | b]; a scalar."""
    return (
        _ROUNDING_EPS * torch.finfo(dtype).eps * torch.maximum(weight.abs().max(), bias.abs().max())
    )


def layers_of(graph: fx.GraphModule) -> list[Layer]:
    """The weight layers of a network that are called once, in order of execution, each with its
    batch norm if any.

    A batch norm belongs to a layer whose units are its channels. Behind a linear layer that is so
    only where the output is of two axes, (N, units): of more, the norm's channels are the second
    axis, and the units the last. So ranks must be known there.
    """
    counts = call_counts(graph)
    found = []
    for node in graph.graph.nodes:
        layer = weight_layer(graph, node)
        if layer is None or counts[node.target] > 1:
            continue
        after = only_user(node)
        norm = batch_norm(graph, after) if after is not None and counts[after.target] == 1 else None
        if norm is not None and not (norm.affine and _over_units(node, layer, norm)):
            norm = None
        last = after if norm is not None and after is not None else node
        found.append(Layer(str(node.target), layer, norm, node, last))
    return found


def _over_units(node: fx.Node, layer: WeightLayer, norm: BatchNorm) -> bool:
    """Whether the channels of a norm that follows a layer are the layer's units."""
    kind = next(norm for kind, norm in _NORM_OF.items() if isinstance(layer, kind))
    return isinstance(norm, kind) and (
        not isinstance(layer, nn.Linear) or node.meta.get(_RANK) == 2
    )


def nonnegative_nodes(
    graph: fx.GraphModule, inactive: Callable[[fx.Node], bool] = lambda _: False
) -> set[fx.Node]:
    """Nodes whose output is non-negative for every input of the network.

    Only the structure counts, so that the answer holds for any weights, unless `inactive` says of a
    node that it calls a layer whose present weights keep a non-negative input non-negative.
    """
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        sources = [arg for arg in _args(node) if isinstance(arg, fx.Node)]
        keeps_sign = calls(graph, node, _SIGN_KEEPERS) or is_addition(graph, node) or inactive(node)
        if is_relu(graph, node) or (
            keeps_sign and bool(sources) and all(source in found for source in sources)
        ):
            found.add(node)
    return found


def _args(node: object) -> tuple[object, ...]:
    return (*node.args, *node.kwargs.values()) if isinstance(node, fx.Node) else ()
