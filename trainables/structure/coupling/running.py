"""Runs a network, and then walks over it: what each node makes is known by the handler of what it
calls."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.coupling.known import (
    Known,
    along,
    compressed,
    found_in,
    has_tensors,
    mapped_known,
)
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk
from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.structure.tracing.other_sizes import of_other_sizes
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import function_name, mapped_tree

_WITHOUT_TENSORS = (
    *(int, float, complex, str, type(None), slice, list, tuple, dict),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What is no object that may hold tensors where none are seen in it."""


@dataclass
class Handlers:
    """How what kind of call is followed: by class of module, or by name of function or method."""

    modules: dict[type[nn.Module], Handler]
    functions: dict[str, Handler]
    makers: dict[str, Handler]
    """Of what makes a tensor of sizes alone."""

    def of(self, graph: GraphModule, node: Node) -> Handler | None:
        """The handler of a node; None if there is none."""
        module = module_of(graph, node)
        if module is not None:
            return self.modules.get(type(module))
        name = function_name(node)
        return self.functions.get(name) or self.maker(node)

    def maker(self, node: Node) -> Handler | None:
        """The handler of a node that makes a tensor of sizes alone; None if it does not."""
        if node.op not in ("call_function", "call_method"):
            return None
        return self.makers.get(function_name(node))


def walked(graph: GraphModule, inputs: Tensor, handlers: Handlers) -> Walk:
    """The walk over a network in evaluation mode on `inputs` (N, *input_shape), N ≥ 2."""
    walk = Walk(graph)
    with evaluating(graph), torch.no_grad():
        run = _Run(graph)
        run.run(inputs.clone())
        walk.made = run.values
        if any(map(_is_size, run.values.values())):
            walk.elsewhere = _elsewhere(graph, inputs)
        for node in graph.graph.nodes:
            walk.known[node] = _known(walk, node, handlers)
    return walk


def _is_size(value: Any) -> bool:
    """Whether a value is a number, or several, that may be sizes of the inputs."""
    if isinstance(value, tuple | list):
        return any(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)


def _elsewhere(graph: GraphModule, inputs: Tensor) -> list[dict[Node, Any]]:
    """What each node makes of inputs of other sizes, as far as the network takes them."""
    found = []

    def run(other: Tensor) -> None:
        one = _Run(graph)
        one.extra_traceback = False  # which is long, and of what is expected
        one.run(other.clone())
        found.append(one.values)

    for _ in of_other_sizes(inputs, run):
        pass
    return found


def numbers_of(graph: GraphModule, inputs: Tensor) -> dict[str, Any]:
    """What each node makes that makes numbers and no tensors, by its name."""
    with evaluating(graph), torch.no_grad():
        run = _Run(graph)
        run.run(inputs.clone())
    found = {}
    for node, value in run.values.items():
        if node.op == "output":
            continue
        if not has_tensors(value):
            found[node.name] = value
    return found


class _Run(fx.Interpreter):
    """Runs a network, and keeps what is no tensor, the shapes of tensors, and those tensors that
    depend on no input."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[Node, Any] = {}
        self._fixed: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        is_fixed = self._is_fixed(n)
        if is_fixed:
            self._fixed.add(n)

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if is_fixed:
                return Known(value.shape, value=value)
            return Known(value.shape)

        self.values[n] = mapped_tree(made, kept)
        return made

    def _is_fixed(self, node: Node) -> bool:
        """Whether what a node makes depends on no input."""
        if node.op == "get_attr":
            return True
        if node.op not in ("call_function", "call_method"):
            return False
        return self._fixed.issuperset(node.all_input_nodes)


def _known(walk: Walk, node: Node, handlers: Handlers) -> Any:
    """What is known of a node's output; where no more is known, what a run of it made: its shapes
    and numbers."""
    made = walk.made[node]
    if node.op == "placeholder":
        return made
    if node.op == "get_attr":
        name = str(node.target)
        return _attribute(walk, name, made)
    before = (node.args, node.kwargs)
    given = fx.node.map_arg(before, walk.known.__getitem__)
    args, kwargs = given
    if node.op == "output":
        walk.stay(args, "the network gives it out")
        return made
    if not has_tensors(made):
        if not isinstance(made, _WITHOUT_TENSORS):
            walk.stay(given, f"'{node.name}' holds them in an object of a class")
        return made
    if not has_tensors(given) and handlers.maker(node) is None:
        return made
    handler = handlers.of(walk.graph, node)
    call = Call(node, args, kwargs)
    found = _handled(handler, walk, call)
    is_known = found is not NotImplemented
    if is_known and _fits(found, made):
        return _with_values(found, made)
    _keep_whole(walk, node, given)
    return made


def _handled(handler: Handler | None, walk: Walk, call: Call) -> Any:
    if handler is None:
        return NotImplemented
    try:
        return handler(walk, call)
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        return NotImplemented  # a form of the call that its handler does not know


def _fits(found: Any, made: Any) -> bool:
    """Whether a handler found as many tensors, of the shapes that there are."""
    return _shapes(found) == _shapes(made)


def _shapes(value: Any) -> list[torch.Size]:
    """The shapes of all tensors within nested values."""
    shapes = []
    for known in found_in(value):
        shapes.append(known.shape)
    return shapes


def _keep_whole(walk: Walk, node: Node, inputs: Any) -> None:
    """Has all stay that a node reads of which no handler knows what it does, and its parameters."""
    module = walk.module(node)
    title = node.name
    if module is not None:
        title = str(node.target)
    walk.unknown.append(title)
    walk.stay(inputs, f"'{title}' mixes them in a way that is not known")
    if module is not None:
        walk.keep_parameters(module, title)


def _with_values(found: Any, made: Any) -> Any:
    """What is known, with the values that a run made."""
    values = [one.value for one in found_in(made)]
    in_order = iter(values)

    def with_value(known: Known) -> Known:
        return replace(known, value=next(in_order))

    return mapped_known(found, with_value)


def _attribute(walk: Walk, name: str, made: Any) -> Any:
    """A parameter or buffer that the network's own code reads: units along each of its axes."""
    if not isinstance(made, Known):
        return made
    value = made.value
    assert value is not None
    unit_maps = []
    for axis, size in enumerate(made.shape):
        if size == 1:
            continue
        units = walk.units_of(name, axis)
        if units is None:
            units = walk.units.fresh(size)
        walk.tensor(name, axis, units)
        unit_map = along(units, axis, made.dim)
        unit_maps.append(unit_map)
    zero = None
    if value.numel():
        zero = compressed(value == 0)
    known = replace(made, unit_maps=tuple(unit_maps))
    return known.with_zero(zero)
