"""The walk over a traced network that finds its units: what each node makes is known by the handler
of what it calls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.structure.coupling.known import Known, compressed, is_unit_map, varying
from slimfront.trainables.structure.coupling.units import NONE, Units
from slimfront.trainables.structure.graph import module_of, submodule
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import function_name, mapped_tree

Handler = Callable[["Walk", "Call"], Any]
"""What a handler is: of the walk and a call, it returns what is known of the call's output, or
`NotImplemented`."""

_KEPT_WHOLE = "'{}' mixes them in a way that is not known"


@dataclass(frozen=True)
class Call:
    """What a node calls, and with what: `Known` in the places of tensors."""

    node: fx.Node
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the layer that a node calls."""
        return str(self.node.target)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by place or by name."""
        if len(self.args) > place:
            return self.args[place]
        return self.kwargs.get(name, default)


@dataclass
class Walk:
    """A traced network, and what is known of each of its nodes."""

    graph: fx.GraphModule
    units: Units = field(default_factory=Units)
    known: dict[fx.Node, Any] = field(default_factory=dict)
    counts: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    """The nodes and layers, by name, that count their inputs, as a mean and a layer norm do, with
    the axis and the units along it."""
    tensors: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """The units along each axis of parameters and buffers, by name."""
    made: dict[fx.Node, Any] = field(default_factory=dict)
    """What each node makes: numbers, and the shapes of tensors."""
    groups: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The units that grouped convolutions read and write, by name: (groups, in), (groups, out)."""
    unknown: list[str] = field(default_factory=list)
    """The nodes whose kind no handler knows, or not in this form."""
    writing: set[tuple[str, int]] = field(default_factory=set)
    """The axes of parameters, by name, along which they make units, and do not only read them."""
    _names: dict[int, str] = field(default_factory=dict)
    """The first name of each parameter and buffer, by identity."""

    def tensor(self, name: str, axis: int, units: Tensor | None, *, reads: bool = False) -> None:
        """Notes the units along an axis of a parameter or buffer, which it makes, or `reads`; None:
        all of it stays. What it has been noted for elsewhere goes together."""
        tensor = _get(self.graph, name)
        name = self._names.setdefault(id(tensor), name)
        if not reads:
            self.writing.add((name, axis))
        missing = [torch.full((0,), NONE)] * tensor.dim()
        noted = self.tensors.setdefault(name, list(missing))
        before = noted[axis]
        if before is not None and before.numel() == 0 and tensor.shape[axis] > 0:
            noted[axis] = units
        elif before is None or units is None:
            for stays in (before, units):
                if stays is not None:
                    self.units.keep(stays, f"'{name}' is used elsewhere too")
            noted[axis] = None
        else:
            self.units.tie(before, units)

    def shape_of(self, node: fx.Node) -> torch.Size | None:
        """The shape of what a node makes; None if that is not one tensor."""
        made = self.made[node]
        return made.shape if isinstance(made, Known) else None

    def units_of(self, name: str, axis: int) -> Tensor | None:
        """The units along an axis of a parameter that were noted before."""
        tensor = _get(self.graph, name)
        noted = self.tensors.get(self._names.get(id(tensor), name))
        units = noted[axis] if noted is not None else None
        return units if units is not None and units.numel() == tensor.shape[axis] else None

    def moved(self, known: Known, move: Callable[[Tensor], Tensor]) -> Known:
        """What a move of entries makes of a tensor; `move` takes tensors of its shape, in
        float64."""
        unit_maps = []
        shape = None
        for unit_map in known.unit_maps:
            # From 1 on: what is padded with 0 is of no unit.
            full = move((unit_map + 1).expand(known.shape).double())
            shape = full.shape
            made = compressed(full.long() - 1)
            if is_unit_map(made):
                unit_maps.append(made)
            else:
                self.units.keep(made, "it is taken out alone")
        zero = None
        if known.zero is not None:
            full = move(known.zero.expand(known.shape).double())
            shape = full.shape
            zero = compressed(full != 0)
        if shape is None:
            shape = move(torch.zeros(1, dtype=torch.float64).expand(known.shape)).shape
        for unit_map in unit_maps:
            if len(varying(unit_map)) > 1:
                self.units.pack(unit_map)
        return Known(shape, self.apart(unit_maps), zero)

    def apart(self, unit_maps: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Colours of one tensor, none of which vary along the same axis: those that do are made one
        where they agree, and stay where they do not."""
        found: list[Tensor] = []
        for unit_map in unit_maps:
            meets = [other for other in found if varying(other) & varying(unit_map)]
            if not meets:
                found.append(unit_map)
            elif len(meets) == 1:
                found[:] = [other for other in found if other is not meets[0]]
                found.append(self._made_one(meets[0], unit_map))
            else:
                self.units.keep(unit_map, "it meets others in several ways")
                for other in meets:
                    self.units.keep(other, "it meets others in several ways")
        return tuple(found)

    def _made_one(self, one: Tensor, other: Tensor) -> Tensor:
        """One unit map of two that vary along a common axis."""
        if varying(one) == varying(other):
            self.units.tie(one, other)
            return torch.where(one == NONE, other, one)
        coarse, fine = (one, other) if varying(one) < varying(other) else (other, one)
        if not varying(coarse) < varying(fine):
            self.units.keep(one, "it meets another in part")
            self.units.keep(other, "it meets another in part")
            return fine
        rows, members = _rows(fine, varying(coarse))
        self.units.same_as_all(coarse.expand(rows).reshape(-1), members)
        return fine

    def all_or_none(self, unit_map: Tensor, axis: int, why: str) -> Tensor | None:
        """Has the units along an axis go as a whole; the unit map of the other axes, or None if
        there is none, and they stay."""
        if unit_map.shape[axis] == 1:
            return unit_map
        if len(varying(unit_map)) == 1:
            self.units.keep(unit_map, why)
            return None
        self.units.tie(unit_map, unit_map.narrow(axis, 0, 1))
        return unit_map.narrow(axis, 0, 1)

    def all_or_none_of(self, unit_map: Tensor, axes: Iterable[int], why: str) -> Tensor | None:
        """The same along several axes."""
        left: Tensor | None = unit_map
        for axis in axes:
            if left is not None:
                left = self.all_or_none(left, axis, why)
        return left

    def stay(self, value: Any, why: str) -> None:
        """Has all units stay of tensors within nested values."""
        for known in found_in(value):
            for unit_map in known.unit_maps:
                self.units.keep(unit_map, why)

    def zero_of(self, run: Callable[[Tensor], Any], dim: int) -> bool:
        """Whether an operation on each entry makes 0 of 0."""
        try:
            with torch.no_grad():
                made = run(torch.zeros([1] * max(dim, 1)))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        return isinstance(made, Tensor) and not bool(made.any())


def walked(graph: fx.GraphModule, inputs: Tensor, handlers: "Handlers") -> Walk:
    """The walk over a network in evaluation mode on `inputs` (N, *input_shape), N ≥ 2."""
    walk = Walk(graph)
    with evaluating(graph), torch.no_grad():
        made = _Run(graph)
        made.run(inputs)
        walk.made = made.values
        for node in graph.graph.nodes:
            walk.known[node] = _known(walk, node, made.values[node], handlers)
    return walk


def numbers_of(graph: fx.GraphModule, inputs: Tensor) -> dict[str, Any]:
    """What each node makes that makes numbers and no tensors, by its name."""
    with evaluating(graph), torch.no_grad():
        run = _Run(graph)
        run.run(inputs)
    return {
        node.name: value
        for node, value in run.values.items()
        if node.op != "output" and not any(True for _ in found_in(value))
    }


@dataclass
class Handlers:
    """How what kind of call is followed: by class of module, or by name of function or method."""

    modules: dict[type[nn.Module], Handler]
    functions: dict[str, Handler]

    def of(self, graph: fx.GraphModule, node: fx.Node) -> Handler | None:
        """The handler of a node; None if there is none."""
        if node.op == "call_module":
            return self.modules.get(type(submodule(graph, str(node.target))))
        return self.functions.get(function_name(node))


class _Run(fx.Interpreter):
    """Runs a network, and keeps what is no tensor, the shapes of tensors, and those tensors that
    depend on no input."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}
        self._fixed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        fixed = n.op == "get_attr" or (
            n.op == "call_function" and all(source in self._fixed for source in n.all_input_nodes)
        )
        fixed |= n.op == "call_method" and all(s in self._fixed for s in n.all_input_nodes)
        if fixed:
            self._fixed.add(n)
        self.values[n] = mapped_tree(made, lambda t: _of_tensor(t, fixed))
        return made


def _of_tensor(value: Any, fixed: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Known(value.shape, value=value if fixed else None)


def _known(walk: Walk, node: fx.Node, made: Any, handlers: Handlers) -> Any:
    """What is known of a node's output: of what it `made`, shapes alone are."""
    args = fx.node.map_arg(node.args, lambda source: walk.known[source])
    kwargs = fx.node.map_arg(node.kwargs, lambda source: walk.known[source])
    if node.op == "placeholder":
        return made
    if node.op == "output":
        walk.stay(args, "the network gives it out")
        return made
    if node.op == "get_attr":
        return _attribute(walk, str(node.target), made)
    if not any(True for _ in found_in(made)):
        return made  # sizes and other numbers
    if not any(True for _ in found_in((args, kwargs))):
        return made
    handler = handlers.of(walk.graph, node)
    found = NotImplemented if handler is None else _handled(handler, walk, Call(node, args, kwargs))
    if found is NotImplemented or not _fits(found, made):
        walk.unknown.append(_title(node))
        walk.stay((args, kwargs), _KEPT_WHOLE.format(_title(node)))
        _stays_in_module(walk, node)
        return made
    return _with_values(found, made)


def _handled(handler: Handler, walk: Walk, call: Call) -> Any:
    try:
        return handler(walk, call)
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        return NotImplemented  # a form of the call that its handler does not know


def _title(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _fits(found: Any, made: Any) -> bool:
    """Whether a handler found as many tensors, of the shapes that there are."""
    ours, theirs = list(found_in(found)), list(found_in(made))
    return [one.shape for one in ours] == [one.shape for one in theirs]


def _with_values(found: Any, made: Any) -> Any:
    """What is known, with the values that a run made."""
    values = iter(list(found_in(made)))
    return mapped_known(found, lambda one: _with_value(one, next(values).value))


def _with_value(known: Known, value: Tensor | None) -> Known:
    return Known(known.shape, known.unit_maps, known.zero, value)


def _stays_in_module(walk: Walk, node: fx.Node) -> None:
    """Has the parameters of a module whose kind has no handler stay as they are."""
    module = module_of(walk.graph, node)
    if module is None:
        return
    for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
        for axis in range(tensor.dim()):
            walk.tensor(f"{node.target}.{leaf}", axis, None)


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
        unit_maps.append(along(units, axis, made.dim))
    zero = compressed(value == 0) if value.numel() else None
    return Known(made.shape, tuple(unit_maps), zero, value).with_zero(zero)


def along(units: Tensor, axis: int, dim: int) -> Tensor:
    """Units (n,) along an axis of a tensor of `dim` axes."""
    shape = [1] * dim
    shape[axis] = len(units)
    return units.reshape(shape)


def found_in(value: Any) -> Iterable[Known]:
    """What is known of tensors within nested values."""
    if isinstance(value, Known):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from found_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from found_in(item)
    elif isinstance(value, slice):
        yield from found_in((value.start, value.stop, value.step))


def mapped_known(value: Any, change: Callable[[Known], Any]) -> Any:
    """Nested values with what is known of tensors changed."""
    if isinstance(value, Known):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped_known(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped_known(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _rows(unit_map: Tensor, axes: frozenset[int]) -> tuple[list[int], Tensor]:
    """The shape of a unit map along `axes` alone, and its units there: (places, others)."""
    order = [*sorted(axes), *(axis for axis in range(unit_map.dim()) if axis not in axes)]
    places = 1
    for axis in axes:
        places *= unit_map.shape[axis]
    shape = [unit_map.shape[axis] if axis in axes else 1 for axis in range(unit_map.dim())]
    return shape, unit_map.permute(order).reshape(places, -1)


def _get(graph: fx.GraphModule, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    owner = submodule(graph, parent) if parent else graph
    tensor: Tensor = getattr(owner, leaf)
    return tensor
