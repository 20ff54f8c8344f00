"""The graph of a network by torch.fx, without what it keeps of checks and of optional arguments."""

import inspect
import operator
import threading

from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure import operations
from slimfront.trainables.structure.tracing.encoders import Tracer
from slimfront.trainables.structure.tracing.exported import writes_elsewhere
from slimfront.trainables.structure.tracing.factories import factories_seen
from slimfront.trainables.structure.tracing.returned import make_writable
from slimfront.trainables.structure.tracing.whole_numbers import whole_numbers_seen
from slimfront.trainables.torch_internals import is_check

_tracing = threading.Lock()


def symbolically_traced(model: nn.Module, sample: Tensor | None = None) -> GraphModule:
    """The graph of a network by torch.fx, which raises errors of many kinds on one that it cannot
    trace. With a `sample` (N, *input_shape), the network may unpack shapes."""
    try:
        return _symbolically_traced(model, Tracer(sample))
    except TypeError:
        # A buffer that is cut to the length of the inputs, say: its index is no number yet.
        tracer = Tracer(sample)
        tracer.proxy_buffer_attributes = True
        return _symbolically_traced(model, tracer)


def _symbolically_traced(model: nn.Module, tracer: Tracer) -> GraphModule:
    # While it traces, torch's modules and functions are others: one thread at a time.
    with _tracing, factories_seen(), whole_numbers_seen(model):
        graph = tracer.trace(model, _defaults(model))
    _drop_optional(graph)
    _drop_checks(graph)
    _name_operators(graph)
    make_writable(graph)
    return GraphModule(
        tracer.root,
        graph,
        class_name=type(model).__name__,
    )


def _name_operators(graph: fx.Graph) -> None:
    """Has operators on a tensor of the network's own, such as a table that is indexed by inputs, be
    the functions that they are on inputs: torch.fx has them as methods."""
    for node in graph.nodes:
        if node.op != "call_method" or not str(node.target).startswith("__"):
            continue
        function = getattr(operator, str(node.target), None)
        if operations.name_of(function) is not None:
            node.op = "call_function"
            node.target = function


def is_known(traced: GraphModule) -> bool:
    """Whether all that a network's code calls is known: what torch.fx takes for one call can be a
    function of a library, which is of other operations."""
    if writes_elsewhere(traced):
        return False
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if not _is_known_function(node):
            return False
    return True


def _is_known_function(node: Node) -> bool:
    if operations.name_of(node.target) is not None:
        return True
    if node.target is not getattr:
        return False
    return node.args[1] in operations.ATTRIBUTES


def _defaults(model: nn.Module) -> dict[str, object] | None:
    """The optional arguments of a network's forward, which get inputs alone: they are what they are
    when left out."""
    signature = inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    found: dict[str, object] = {}
    for parameter in parameters[1:]:
        if parameter.default is not parameter.empty:
            found[parameter.name] = parameter.default
    return found or None


def _drop_checks(graph: fx.Graph) -> None:
    """Takes out checks that nothing reads."""
    for node in reversed(graph.nodes):
        if is_check(node) and not node.users:
            graph.erase_node(node)


def _drop_optional(graph: fx.Graph) -> None:
    """Takes out what torch.fx keeps of optional arguments: placeholders, and checks that they are
    what they were."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[1:]:
        readers = _descendants(node)
        if not _end_in_checks(readers):
            continue
        for reader in reversed(readers):
            graph.erase_node(reader)
        graph.erase_node(node)


def _end_in_checks(nodes: list[Node]) -> bool:
    """Whether nothing comes of these nodes but checks."""
    for node in nodes:
        if node.users:
            continue
        if not is_check(node):
            return False
    return True


def _descendants(node: Node) -> list[Node]:
    """What depends on a node, in the order of the graph."""
    within = {node}
    found = []
    for other in node.graph.nodes:
        if not within.isdisjoint(other.all_input_nodes):
            within.add(other)
            found.append(other)
    return found
