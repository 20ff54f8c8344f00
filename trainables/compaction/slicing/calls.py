"""What the nodes of a network are called with when some of its units go."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from slimfront.trainables.compaction.slicing.bounds import Bounds
from slimfront.trainables.compaction.slicing.gathered import places_of
from slimfront.trainables.compaction.slicing.sizes import changed_numbers, in_proportion, item_of
from slimfront.trainables.compaction.slicing.stays import CannotSlice, Slices, has_tensors
from slimfront.trainables.structure.coupling.convolutions import CONVOLUTIONS, GROUPS_PLACE
from slimfront.trainables.structure.coupling.known import Known, found_in
from slimfront.trainables.structure.coupling.moves import FILLS, MOVES, MOVING_MODULES, sizes_in
from slimfront.trainables.structure.coupling.units import packed
from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.torch_internals import OpOverload, function_name

_SIZES_AT_ONCE = ("view", "reshape", "expand", "_unsafe_view", "view_copy", "broadcast_to")
_COUNTED_BY_MODULES = ("layer_norm",)
"""What counts its inputs, and can go on counting those that went as a module alone."""
_SPLITS = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")


@dataclass(frozen=True)
class NewCall:
    """What a node is, and is called with."""

    op: str
    target: Any
    args: Any
    kwargs: Any

    @classmethod
    def of(cls, node: Node, args: Any, kwargs: Any) -> "NewCall":
        """What a node is already, called with other arguments."""
        return cls(
            op=node.op,
            target=node.target,
            args=args,
            kwargs=kwargs,
        )

    def write(self, node: Node) -> None:
        """Makes a node this call."""
        node.op = self.op
        node.target = self.target
        node.args = self.args
        node.kwargs = self.kwargs


def new_calls(slices: Slices) -> dict[Node, NewCall]:
    """The calls that change, as they are without the units that go; nothing is changed.

    Raises:
        CannotSlice: if a size in the code cannot be changed.
    """
    calls = _Calls(slices)
    found = {}
    for node in slices.network.graph.nodes:
        change = calls.rewritten(node)
        if change is not None:
            found[node] = change
    return found


class _Calls:
    """The calls of a network without the units that go."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices
        self.changed = changed_numbers(slices)

    def rewritten(self, node: Node) -> NewCall | None:
        """A node's call without the units; None if it stays as it is."""
        if node.op == "placeholder":
            return None
        made = self.slices.known(node)
        if not has_tensors(made):
            return None
        if isinstance(module_of(self.slices.network, node), MOVING_MODULES):
            return self._moving_module(node)
        if node.op not in ("call_function", "call_method"):
            return self._with_numbers(node)
        name = function_name(node)
        if name == "scaled_dot_product_attention":
            return self._with_scale(node)
        if name in _COUNTED_BY_MODULES and self._is_touched(node):
            raise CannotSlice(node)
        is_known = name in MOVES or name in FILLS or name in CONVOLUTIONS
        if not is_known or not self._is_concerned(node):
            return self._with_numbers(node)
        if name in FILLS:
            return self._filled(node, name)
        if name in CONVOLUTIONS:
            return self._convolved(node, name)
        return self._first_right(node, lambda: self._moved(node, name))

    def _moving_module(self, node: Node) -> NewCall | None:
        """The call of a module that moves entries, without the units."""
        if not self._is_touched(node):
            return None
        module: Any = module_of(self.slices.network, node)

        def as_it_is() -> NewCall:
            if not isinstance(module, nn.Unflatten):
                return NewCall.of(node, node.args, node.kwargs)
            shape = self.slices.shape(self.slices.known(node))
            axis = int(module.dim)
            sizes = self._unflattened(node, axis, module.unflattened_size, shape)
            return NewCall("call_method", "unflatten", (node.args[0], axis, sizes), {})

        return self._first_right(node, as_it_is)

    def _first_right(self, node: Node, move: Callable[[], NewCall]) -> NewCall:
        """What `move` makes of a node, if it brings what stays to where it should be; else what
        takes it by its places.

        Raises:
            CannotSlice: if neither does.
        """
        try:
            call = move()
            self._check_move(node, call)
        except CannotSlice:
            found = places_of(self.slices, node)
            if found is None:
                raise
            axis, places = found
            index = (*[slice(None)] * axis, places)
            call = NewCall("call_function", operator.getitem, (node.args[0], index), {})
            self._check_move(node, call)
        return call

    def _is_touched(self, node: Node) -> bool:
        """Whether an input or output of a node becomes smaller."""
        values = []
        for around in (*node.all_input_nodes, node):
            values.append(self.slices.known(around))
        for known in found_in(values):
            mask = self.slices.mask(known)
            if not mask.all():
                return True
        return False

    def _is_concerned(self, node: Node) -> bool:
        """Whether an input or output of a node becomes smaller, or it reads sizes of another tensor
        that change, and follow from the inputs too."""
        if self._is_touched(node):
            return True
        return any(
            source in self.changed and source in self.slices.by_inputs
            for source in node.all_input_nodes
        )

    def _with_numbers(self, node: Node) -> NewCall | None:
        """Numbers that follow from sizes stay what they were."""
        before = (node.args, node.kwargs)
        after = fx.node.map_arg(before, self._number)
        if after == before:
            return None
        args, kwargs = after
        return NewCall.of(node, args, kwargs)

    def _number(self, source: Node) -> Any:
        if source in self.slices.by_inputs:
            return source
        if source in self.changed:
            return self.slices.known(source)
        return source

    def _with_scale(self, node: Node) -> NewCall | None:
        """Attention whose scale stays what it was by the width of its queries."""
        query = self.slices.known_input(node)
        width = self.slices.old_width(query)
        has_scale = node.kwargs.get("scale") is not None
        if width is None or has_scale:
            return self._with_numbers(node)
        kwargs = dict(node.kwargs)
        kwargs["scale"] = width**-0.5
        return NewCall.of(node, node.args, kwargs)

    def _filled(self, node: Node, name: str) -> NewCall:
        """A tensor of one number, of other sizes."""
        shape = self.slices.shape(self.slices.known(node))
        before: list[Any] = []
        arguments = list(node.args)
        if name.startswith("new_"):
            before = arguments[:1]
            arguments = arguments[1:]
        first = arguments[0]
        given = sizes_in(arguments)
        is_one_argument = isinstance(first, list | tuple)
        if isinstance(first, Node) and isinstance(self.slices.known(first), tuple | list):
            given = self._of_shape(node, first)
            is_one_argument = True
        if len(given) != len(shape):
            raise CannotSlice(node)
        sizes = self._each_size(node, given, shape)
        if is_one_argument:
            return NewCall.of(node, (*before, sizes, *arguments[1:]), node.kwargs)
        return NewCall.of(node, (*before, *sizes), node.kwargs)

    def _convolved(self, node: Node, name: str) -> NewCall:
        """A convolution by a weight that is computed, with as many groups as there are channels
        where it has one for each."""
        call = self._with_numbers(node) or NewCall.of(node, node.args, node.kwargs)
        args = list(call.args)
        kwargs = dict(call.kwargs)
        place = GROUPS_PLACE
        by_place = len(args) > place
        groups = args[place] if by_place else kwargs.get("groups", 1)
        if groups == 1:
            return call
        known = self.slices.known_input(node)
        positions = CONVOLUTIONS[name]
        channels = self.slices.shape(known)[-positions - 1]
        if by_place:
            args[place] = channels
        else:
            kwargs["groups"] = channels
        return NewCall.of(node, tuple(args), kwargs)

    def _moved(self, node: Node, name: str) -> NewCall:
        """A call that only moves entries, with other sizes and bounds."""
        if name in _SPLITS:
            return self._split(node)
        args: list[Any] = list(node.args)
        is_given_sizes = name in (*_SIZES_AT_ONCE, "unflatten")
        if is_given_sizes:
            args = self._resized(node, name, args)
        else:
            args = self._bounded(node, name, args)
        kwargs = dict(node.kwargs)
        return NewCall.of(node, tuple(args), kwargs)

    def _resized(self, node: Node, name: str, args: list[Any]) -> list[Any]:
        """The arguments of a move that is given sizes."""
        made = self.slices.known(node)
        shape = self.slices.shape(made)
        if name == "unflatten":
            tensor, axis, sizes = args
            parts = self._unflattened(node, axis, sizes, shape)
            return [tensor, axis, parts]
        tensor, *sizes = args
        new = self._sizes(node, sizes, shape)
        return [tensor, *new]

    def _bounded(self, node: Node, name: str, args: list[Any]) -> list[Any]:
        """The arguments of a move that may be given an index or bounds."""
        known = self.slices.known_input(node)
        bounds = Bounds(self.slices, node, known)
        if name == "getitem" and isinstance(known, Known):
            tensor, index = args
            part = bounds.of_index(index)
            return [tensor, part]
        if name in ("slice", "narrow", "select"):
            return bounds.of_call(name, args)
        return args

    def _split(self, node: Node) -> NewCall:
        """A split into parts of the sizes that they will have."""
        kwargs: dict[str, Any] = dict(node.kwargs)
        axis: Any = 0
        if len(node.args) > 2:
            axis = node.args[2]
        axis = kwargs.pop("dim", axis)
        parts = self.slices.known(node)
        sizes = []
        for part in parts:
            shape = self.slices.shape(part)
            sizes.append(shape[axis])
        op = "call_method"
        target: Any = "split"
        if isinstance(node.target, OpOverload):
            op = "call_function"
            target = torch.ops.aten.split_with_sizes.default
        return NewCall(
            op=op,
            target=target,
            args=(node.args[0], sizes, axis),
            kwargs=kwargs,
        )

    def _sizes(self, node: Node, sizes: list[Any], shape: tuple[int, ...]) -> list[Any]:
        """The sizes of `view` and the like, which stand one by one, in a list, or are a shape."""
        given = sizes
        if len(sizes) == 1 and isinstance(sizes[0], Node):
            given = self._of_shape(node, sizes[0])
        are_in_list = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
        if are_in_list:
            (in_list,) = sizes
            given = list(in_list)
        if len(given) != len(shape):
            return sizes
        new = self._each_size(node, given, shape)
        if are_in_list:
            return [new]
        return new

    def _of_shape(self, node: Node, shape: Node) -> list[Any]:
        """The sizes of a shape, one by one."""
        known = self.slices.known(shape)
        if not isinstance(known, tuple | list):
            return [shape]
        parts = []
        for place in range(len(known)):
            part = item_of(self.slices, node, shape, place)
            if shape in self.changed and isinstance(part, Node):
                self.changed[part] = self.changed[shape][place]
            parts.append(part)
        return parts

    def _unflattened(
        self, node: Node, axis: int, sizes: Any, shape: tuple[int, ...]
    ) -> tuple[Any, ...]:
        """The sizes that an axis is parted into."""
        count = len(sizes)
        axes_before = len(shape) - count + 1
        start = axis % axes_before
        end = start + count
        new = self._each_size(node, sizes, shape[start:end])
        return tuple(new)

    def _each_size(self, node: Node, sizes: Any, wanted: tuple[int, ...]) -> list[Any]:
        """The sizes that a node is given, as they are wanted."""
        found = []
        for size, each in zip(sizes, wanted, strict=True):
            new = self._size(node, size, each)
            found.append(new)
        return found

    def _size(self, node: Node, size: Any, wanted: int) -> Any:
        if isinstance(size, Node):
            return self._computed_size(node, size, wanted)
        if size == -1:
            return size
        return wanted

    def _computed_size(self, node: Node, size: Node, wanted: int) -> Any:
        """A size that the code computes, as it is wanted."""
        follows_inputs = size in self.slices.by_inputs
        will_be = self.changed.get(size, self.slices.known(size))
        is_right = will_be == wanted
        if follows_inputs and not is_right:
            return in_proportion(self.slices, node, size, will_be, wanted)
        is_sure = follows_inputs or size not in self.changed
        return size if is_right and is_sure else wanted

    def _check_move(self, node: Node, call: NewCall) -> None:
        """Moves the numbers of units that stay, as the changed call would, and compares.

        Raises:
            CannotSlice: if they do not come to stand where they should.
        """
        slices = self.slices
        known = slices.known_input(node)
        if not isinstance(known, Known):
            return  # an item of several outputs
        _, *rest = call.args
        given = (rest, call.kwargs)
        args, kwargs = fx.node.map_arg(given, self._value)
        mask = slices.mask(known)
        for unit_map in known.unit_maps:
            numbers = unit_map + 1
            entries = packed(numbers.expand(known.shape), mask)
            try:
                moved = slices.walk.called(
                    node if call.op == "call_module" else call,  # type: ignore[arg-type]
                    args=[entries.double(), *args],
                    kwargs=kwargs,
                )
            except (RuntimeError, IndexError, ValueError, TypeError):
                raise CannotSlice(node) from None
            _compare(slices, node, unit_map, moved)

    def _value(self, node: Node) -> Any:
        """What a node will make: a number, or a tensor."""
        known = self.slices.known(node)
        if not isinstance(known, Known):
            return self.changed.get(node, known)
        if known.value is not None:
            return known.value
        shape = self.slices.shape(known)
        return torch.zeros(shape)


def _compare(slices: Slices, node: Node, unit_map: Tensor, moved: Any) -> None:
    """Compares the `moved` numbers of units with those of what the node makes."""
    made = slices.known(node)
    outputs = list(found_in(made))
    pieces = [moved]
    if isinstance(moved, list | tuple):
        pieces = list(moved)
    wanted_shapes = [slices.shape(output) for output in outputs]
    if [piece.shape for piece in pieces] != wanted_shapes:
        raise CannotSlice(node)
    for output, piece in zip(outputs, pieces, strict=True):
        mask = slices.mask(output)
        for other in output.unit_maps:
            if not _have_in_common(unit_map, other):
                continue
            units = packed(other.expand(output.shape), mask)
            wanted = units.double() + 1
            if not torch.equal(wanted, piece):
                raise CannotSlice(node)


def _have_in_common(one: Tensor, other: Tensor) -> bool:
    """Whether two unit maps have a unit in common."""
    in_both = torch.isin(one, other)
    return bool(in_both.any())
