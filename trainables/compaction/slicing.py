"""Taking units out of a traced network: out of its parameters, the settings of its layers, and the
sizes in its code."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction.layers import set_module
from slimfront.trainables.compaction.resized import parameter_like, replace_tensors, settle
from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.counting import counting
from slimfront.trainables.structure.coupling.graph_of_units import units_of
from slimfront.trainables.structure.coupling.known import Known, found_in, mapped_known
from slimfront.trainables.structure.coupling.moves import MOVES
from slimfront.trainables.structure.coupling.running import numbers_of
from slimfront.trainables.structure.coupling.units import NONE, packed, packed_shape
from slimfront.trainables.structure.coupling.walk import Walk
from slimfront.trainables.structure.graph import module_of, submodule
from slimfront.trainables.structure.tracing.exported import writes_elsewhere
from slimfront.trainables.torch_internals import OpOverload, function_name

_SIZES_AT_ONCE = ("view", "reshape", "expand", "_unsafe_view", "view_copy", "broadcast_to")
_SPLITS = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")


class CannotSlice(Exception):
    """The code of a node has a size in it that cannot be changed."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass
class Slices:
    """A network, what is known of it, and which of its units go."""

    network: fx.GraphModule
    walk: Walk
    gone: Tensor
    """(units,) bool."""
    by_batch: frozenset[fx.Node]
    """The nodes that make numbers which follow from the number of inputs."""
    _after: list[Callable[[], None]] = field(default_factory=list)
    _changed: frozenset[fx.Node] = frozenset()

    def kept(self, units: Tensor) -> Tensor:
        """Which entries stay, for units of any shape."""
        return (units == NONE) | ~self.gone[units]

    def mask(self, known: Known) -> Tensor:
        """Which entries of a tensor stay, of size 1 where all are alike."""
        found = torch.ones([1] * known.dim, dtype=torch.bool)
        for unit_map in known.unit_maps:
            found = found & self.kept(unit_map)
        return found

    def shape(self, known: Known) -> tuple[int, ...]:
        """The shape that a tensor will have."""
        return packed_shape(known.shape, self.mask(known))

    def apply(self) -> None:
        """Takes the units out, in place.

        Raises:
            CannotSlice: if a size in the code cannot be changed; nothing was changed then.
        """
        self._changed = self._find_changed()
        changes = [self._rewritten(node) for node in self.network.graph.nodes]
        for node, change in zip(list(self.network.graph.nodes), changes, strict=True):
            if change is not None:
                node.op, node.target, node.args, node.kwargs = change
        self._slice_tensors()
        self._settle_modules()
        for finish in self._after:
            finish()
        self.network.graph.eliminate_dead_code()
        self.network.recompile()

    # What nodes are called with.

    def _rewritten(self, node: fx.Node) -> tuple[str, Any, Any, Any] | None:
        """What a node is, and is called with, without the units; None if it stays as it is."""
        name = function_name(node) if node.op in ("call_function", "call_method") else ""
        if node.name in self.walk.counts and node.op != "call_module":
            self._after.append(lambda: self._recount(node))
        if not any(True for _ in found_in(self.walk.known[node])) or node.op == "placeholder":
            return None
        if name == "scaled_dot_product_attention":
            return self._with_scale(node)
        if name not in MOVES or not self._is_touched(node):
            return self._with_numbers(node)
        op, target, args, kwargs = self._moved(node, name)
        self._check_move(node, op, target, args, kwargs)
        return op, target, args, kwargs

    def _find_changed(self) -> frozenset[fx.Node]:
        """The nodes that would make other numbers than they made, from the sizes that change."""
        new: dict[fx.Node, Any] = {}
        changed = set()
        for node in self.network.graph.nodes:
            value = self.walk.known[node]
            if node.op not in ("call_function", "call_method") or isinstance(value, Known):
                new[node] = mapped_known(value, lambda known: _empty(self.shape(known)))
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: new[source])
            if any(True for _ in found_in(value)):
                new[node] = mapped_known(value, lambda known: _empty(self.shape(known)))
                continue
            try:
                new[node] = self.walk.called(node, args, kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError):
                new[node] = value  # it stays as it is, and the outputs are compared in the end
            if _is_of_sizes(value) and new[node] != value:
                changed.add(node)
        return frozenset(changed)

    def _is_touched(self, node: fx.Node) -> bool:
        """Whether an input or output of a node becomes smaller."""
        inputs = [self.walk.known[source] for source in node.all_input_nodes]
        tensors = found_in([*inputs, self.walk.known[node]])
        return any(not bool(self.mask(known).all()) for known in tensors)

    def _with_numbers(self, node: fx.Node) -> tuple[str, Any, Any, Any] | None:
        """Numbers that follow from sizes stay what they were."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._number)
        return (
            None
            if (args, kwargs) == (node.args, node.kwargs)
            else (node.op, node.target, args, kwargs)
        )

    def _with_scale(self, node: fx.Node) -> tuple[str, Any, Any, Any] | None:
        """Attention whose scale stays what it was by the width of its queries."""
        width = self._old_width(self.walk.known[node.all_input_nodes[0]])
        if width is None or node.kwargs.get("scale") is not None:
            return self._with_numbers(node)
        return node.op, node.target, node.args, {**node.kwargs, "scale": width**-0.5}

    def _old_width(self, query: Known, heads: int = 1, heads_left: int = 1) -> int | None:
        """How wide each head of queries was, if it becomes narrower; None if not."""
        width = query.shape[-1] // heads
        return None if self.shape(query)[-1] // heads_left == width else width

    def _number(self, source: fx.Node) -> Any:
        return (
            source
            if source in self.by_batch or source not in self._changed
            else self.walk.known[source]
        )

    def _moved(self, node: fx.Node, name: str) -> tuple[str, Any, Any, Any]:
        made = self.walk.known[node]
        args: list[Any] = list(node.args)
        kwargs: dict[str, Any] = dict(node.kwargs)
        op: str = node.op
        target: Any = node.target
        if name in _SIZES_AT_ONCE:
            args = [args[0], *self._sizes(args[1:], made)]
        elif name == "unflatten":
            args = [*args[:2], self._unflattened(args, made)]
        elif name in _SPLITS:
            axis = kwargs.pop("dim", args[2] if len(args) > 2 else 0)
            sizes = [self.shape(part)[axis] for part in made]
            aten = isinstance(target, OpOverload)
            target = torch.ops.aten.split_with_sizes.default if aten else "split"
            op, args = ("call_function" if aten else "call_method"), [args[0], sizes, axis]
        elif name == "getitem" and isinstance(self.walk.known[node.all_input_nodes[0]], Known):
            args = [args[0], self._index(node, args[1])]
        elif name in ("slice", "narrow", "select"):
            args = self._bounds(node, name, args, kwargs)
        return op, target, tuple(args), kwargs

    def _sizes(self, sizes: list[Any], made: Known) -> list[Any]:
        nested = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
        given = list(sizes[0]) if nested else sizes
        shape = self.shape(made)
        if len(given) != len(shape):
            return sizes
        new = [self._size(size, shape[axis]) for axis, size in enumerate(given)]
        return [new] if nested else new

    def _size(self, size: Any, wanted: int) -> Any:
        if isinstance(size, fx.Node):
            stays = size in self.by_batch or (
                size not in self._changed and self.walk.known[size] == wanted
            )
            return size if stays else wanted
        return size if size == -1 else wanted

    def _unflattened(self, args: list[Any], made: Known) -> Any:
        shape = self.shape(made)
        axis = args[1] % (len(shape) - len(args[2]) + 1)
        parts = shape[axis : axis + len(args[2])]
        return tuple(self._size(size, part) for size, part in zip(args[2], parts, strict=True))

    def _index(self, node: fx.Node, index: Any) -> Any:
        """An index whose bounds are counted among what stays."""
        known = self.walk.known[node.all_input_nodes[0]]
        parts = list(index) if isinstance(index, tuple) else [index]
        taken = [part for part in parts if part is not None and part is not Ellipsis]
        new: list[Any] = []
        axis = 0
        for part in parts:
            if part is Ellipsis:
                axis += known.dim - len(taken)
                new.append(part)
            elif part is None:
                new.append(part)
            else:
                new.append(self._place(node, known, axis, part))
                axis += 1
        return tuple(new) if isinstance(index, tuple) else new[0]

    def _place(self, node: fx.Node, known: Known, axis: int, part: Any) -> Any:
        kept = self._kept_along(known, axis)
        if kept.all():
            return part
        if isinstance(part, slice) and part.step in (None, 1):
            start, stop = (self._counted(node, kept, bound) for bound in (part.start, part.stop))
            return slice(start, stop, part.step)
        if isinstance(part, int):
            return self._counted(node, kept, part)
        raise CannotSlice(node)

    def _kept_along(self, known: Known, axis: int) -> Tensor:
        """Which places along an axis have anything that stays: (size,)."""
        mask = self.mask(known)
        others = tuple(other for other in range(known.dim) if other != axis)
        found = mask.any(dim=others) if others else mask
        return found.reshape(-1).expand(known.shape[axis])

    def _counted(self, node: fx.Node, kept: Tensor, bound: Any) -> Any:
        """How many places before one stay."""
        if bound is None:
            return None
        if isinstance(bound, fx.Node):
            if bound in self.by_batch:
                raise CannotSlice(node)
            bound = self.walk.known[bound]
        if bound >= len(kept):
            return bound
        return int(kept[:bound].sum())

    def _bounds(
        self, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]
    ) -> list[Any]:
        known = self.walk.known[node.all_input_nodes[0]]
        if kwargs or len(args) < 2:
            raise CannotSlice(node)
        axis = args[1] % known.dim
        kept = self._kept_along(known, axis)
        if kept.all():
            return args
        if name == "select":
            return [*args[:2], self._counted(node, kept, args[2])]
        if name == "narrow":
            start, length = args[2], args[3]
            first = self._counted(node, kept, start)
            return [*args[:2], first, self._counted(node, kept, start + length) - first]
        if len(args) > 4 and args[4] != 1:
            raise CannotSlice(node)
        start, stop = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
        return [*args[:2], self._counted(node, kept, start), self._counted(node, kept, stop)]

    def _check_move(self, node: fx.Node, op: str, target: Any, args: Any, kwargs: Any) -> None:
        """Moves the numbers of units that stay, as the changed call would, and compares.

        Raises:
            CannotSlice: if they do not come to stand where they should.
        """
        known = self.walk.known[node.all_input_nodes[0]]
        if not isinstance(known, Known):
            return  # an item of several outputs
        given = fx.node.map_arg((args[1:], kwargs), self._value)
        changed = _Call(op, target)
        for unit_map in known.unit_maps:
            entries = packed((unit_map + 1).expand(known.shape), self.mask(known)).double()
            try:
                moved = self.walk.called(changed, [entries, *given[0]], given[1])  # type: ignore[arg-type]
            except (RuntimeError, IndexError, ValueError, TypeError):
                raise CannotSlice(node) from None
            self._compare(node, unit_map, moved)

    def _compare(self, node: fx.Node, unit_map: Tensor, moved: Any) -> None:
        outputs = list(found_in(self.walk.known[node]))
        pieces = list(moved) if isinstance(moved, list | tuple) else [moved]
        if [piece.shape for piece in pieces] != [self.shape(one) for one in outputs]:
            raise CannotSlice(node)
        numbers = set(unit_map.unique().tolist())
        for output, piece in zip(outputs, pieces, strict=True):
            for other in output.unit_maps:
                if not numbers.intersection(other.unique().tolist()):
                    continue
                wanted = packed(other.expand(output.shape), self.mask(output))
                if not torch.equal(wanted.double() + 1, piece):
                    raise CannotSlice(node)

    def _value(self, node: fx.Node) -> Any:
        """What a node makes: a number, or a tensor."""
        value = self.walk.known[node]
        if not isinstance(value, Known):
            return value
        return torch.zeros(self.shape(value)) if value.value is None else value.value

    def _recount(self, node: fx.Node) -> None:
        """Has a mean over units count those that went."""
        share = 1.0
        for _, units in self.walk.counts[node.name]:
            share *= float(self.kept(units).double().mean())
        if share == 1:
            return
        with self.network.graph.inserting_after(node):
            scaled = self.network.graph.call_function(operator.mul, (node, share))
        node.replace_all_uses_with(scaled, lambda user: user is not scaled)

    # What layers have.

    def _slice_tensors(self) -> None:
        new: dict[int, Tensor] = {}
        for name, axes in self.walk.tensors.items():
            owner, _, leaf = name.rpartition(".")
            tensor: Tensor = getattr(
                submodule(self.network, owner) if owner else self.network, leaf
            )
            sliced = tensor.detach()
            for axis, units in enumerate(axes):
                if units is None or units.numel() != tensor.shape[axis]:
                    continue
                kept = self.kept(units)
                if not kept.all():
                    sliced = sliced.index_select(axis, kept.nonzero().flatten().to(sliced.device))
            grouped = self.walk.groups.get(owner)
            if grouped is not None and leaf == "weight":
                sliced = self._of_groups(owner, sliced, grouped[0])
            if sliced.shape != tensor.shape:
                new[id(tensor)] = parameter_like(tensor, sliced)
        replace_tensors(self.network, new)

    def _of_groups(self, name: str, weight: Tensor, inputs: Tensor) -> Tensor:
        """A grouped convolution's weight with what stays of the inputs of each group."""
        module: Any = submodule(self.network, name)
        kept = self.kept(inputs)
        stay = kept.any(1)
        module.groups = int(stay.sum())
        if kept.shape[1] == 1:
            return weight
        parts = weight.unflatten(0, (module.groups, -1))
        columns = kept[stay]
        found = [part[:, column] for part, column in zip(parts, columns, strict=True)]
        return torch.cat(found)

    def _settle_modules(self) -> None:
        seen = set()
        for node in list(self.network.graph.nodes):
            module = module_of(self.network, node)
            if module is not None and node.target not in seen:
                seen.add(node.target)
                self._settle(node, module)

    def _settle_attention(self, node: fx.Node, module: Attention | ScaledDotProduct) -> None:
        query = self.walk.known[node.all_input_nodes[0]]
        before = heads = 1
        if isinstance(module, Attention):
            before = heads = module.heads
            for _, units in self.walk.counts.get(str(node.target), ()):
                heads = int(self.kept(units).any(1).sum())
            module.heads = heads
        width = self._old_width(query, before, heads)
        if width is not None and module.scale is None:
            module.scale = width**-0.5

    def _settle(self, node: fx.Node, module: nn.Module) -> None:
        """Tells a layer its new sizes; one that counts, how many there were."""
        name = str(node.target)
        if isinstance(module, Attention | ScaledDotProduct):
            self._settle_attention(node, module)
            return
        units = [units for _, units in self.walk.counts.get(name, ())]
        if units and not self.kept(units[0]).all():
            set_module(self.network, name, counting(module, self.kept(units[0])))
            return
        settle(module)


def _is_of_sizes(value: Any) -> bool:
    """Whether a value is a number, or a tuple of numbers: types and devices follow from no size."""
    if isinstance(value, tuple | list):
        return all(_is_of_sizes(item) for item in value)
    return isinstance(value, int | float)


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


@dataclass(frozen=True)
class _Call:
    """A call in the place of a node."""

    op: str
    target: Any


def sliced(
    network: fx.GraphModule,
    inputs: Tensor,
    agrees: Callable[[nn.Module], bool],
    multiple: int = 1,
) -> dict[str, int] | None:
    """Takes out of a network, in place, all units that can go without a change of its outputs; how
    many rows each layer lost, by name; None if nothing was done, and not all of it is known.

    What cannot be taken out since a size is written into the code stays. Each try is made on a
    copy, and kept if it `agrees`; else nothing is done. As many units stay as make the number of
    each layer's a `multiple`, if there are so many.
    """
    if writes_elsewhere(network):
        return None
    kept: list[str] = []
    two = inputs[torch.arange(2) % len(inputs)]
    while True:
        copy = copied(network)
        walk = units_of(copy, two)
        for node in copy.graph.nodes:
            if node.name in kept:
                walk.stay([walk.known[node], *_inputs(walk, node)], "a size in the code")
        gone = walk.units.removable(rows=list(_rows(walk)), multiple=multiple)
        lost = _lost(walk, gone)
        if not lost:
            return None if kept or walk.unknown else {}
        by_batch = _by_batch(copy, walk, inputs)
        nodes = frozenset(node for node in copy.graph.nodes if node.name in by_batch)
        try:
            Slices(copy, walk, gone, nodes).apply()
        except CannotSlice as stuck:
            kept.append(stuck.node.name)
            continue
        if not agrees(copy):
            return None
        _take_over(network, copy)
        return lost


def _inputs(walk: Walk, node: fx.Node) -> list[Any]:
    return [walk.known[source] for source in node.all_input_nodes]


def _lost(walk: Walk, gone: Tensor) -> dict[str, int]:
    """How many of the units that it makes each layer loses."""
    found: dict[str, int] = {}
    for owner, units in _made(walk):
        count = int((gone[units] & (units != NONE)).sum())
        if count:
            found[owner] = max(found.get(owner, 0), count)
    return found


def _rows(walk: Walk) -> Iterator[Tensor]:
    """The units that each layer makes."""
    for _, units in _made(walk):
        yield units


def _made(walk: Walk) -> Iterator[tuple[str, Tensor]]:
    """Each layer by name, with the units along each axis of its parameters along which it makes
    them."""
    for name, axes in walk.tensors.items():
        owner = name.rpartition(".")[0] or name
        for axis, units in enumerate(axes):
            makes = axis == 0 or (name, axis) in walk.writing
            if makes and units is not None:
                yield owner, units


def _by_batch(network: fx.GraphModule, walk: Walk, inputs: Tensor) -> frozenset[str]:
    """The names of the nodes that make other numbers for another number of inputs."""
    for_three = numbers_of(network, inputs[torch.arange(3) % len(inputs)])
    for_two = {node.name: value for node, value in walk.known.items() if node.name in for_three}
    return frozenset(name for name, value in for_two.items() if for_three[name] != value)


def _take_over(network: fx.GraphModule, other: fx.GraphModule) -> None:
    """Makes a network what another one is."""
    for name, _ in list(network.named_children()):
        delattr(network, name)
    held = (
        *other.named_children(),
        *other.named_parameters(recurse=False),
        *other.named_buffers(recurse=False),
    )
    for name, part in held:
        setattr(network, name, part)
    network.graph = other.graph
