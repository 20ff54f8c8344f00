"""What the nodes of a graph make of a sample while the graph is being traced: torch.fx knows no
value, and asks for some."""

import dis
import inspect
import operator
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from slimfront.trainables.structure.tracing.other_sizes import of_other_sizes
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import function_name

Made = dict[Node, Any]
"""What each node makes."""

_EXAMPLES = (2, 1, 3)
"""Of how many inputs it is looked at what follows from their number."""
_COUNTED = ("chunk", "tensor_split", "unsafe_chunk")
"""Operations that make as many parts as the code says."""


class Counted(fx.Proxy):
    """What stands for a tensor, a shape or a number while tracing; the tracer knows how long a
    shape is, and numbers that are the same whatever the sizes of the inputs are."""

    def __bool__(self) -> bool:
        frame = inspect.currentframe()
        if frame is not None and frame.f_back is not None and _is_asserted(frame.f_back):
            return True
        tracer: Any = self.tracer
        answer: bool = tracer.to_bool(self)
        return answer

    def __len__(self) -> int:
        tracer: Any = self.tracer
        count: int = tracer.count(self)
        return count

    def __int__(self) -> int:
        tracer: Any = self.tracer
        return int(tracer.number(self))

    def __index__(self) -> int:
        tracer: Any = self.tracer
        try:
            return operator.index(tracer.number(self))
        except fx.proxy.TraceError as error:
            raise TypeError(str(error)) from error  # as of what is no number

    def __float__(self) -> float:
        tracer: Any = self.tracer
        return float(tracer.number(self))

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _CountedAttribute(self, k)


class _CountedAttribute(Counted, fx.proxy.Attribute):
    """What stands for a property of a tensor, such as its shape, or for a method."""


def _is_asserted(frame: FrameType) -> bool:
    """Whether the code that asks whether something is true is an `assert`, which leads nowhere
    else."""
    after = [one for one in dis.get_instructions(frame.f_code) if one.offset > frame.f_lasti]
    for instruction in after:
        if instruction.opname == "NOT_TAKEN" or "JUMP" in instruction.opname:
            continue
        return instruction.opname == "LOAD_ASSERTION_ERROR" or (
            instruction.opname == "LOAD_COMMON_CONSTANT" and instruction.argrepr == "AssertionError"
        )
    return False


class WhileTracing:
    """Runs the part of a graph that is there, each node once, in evaluation mode: of a sample, and,
    where a number is asked for, of other numbers of inputs and of inputs of other sizes."""

    def __init__(self, root: nn.Module, graph: fx.Graph, sample: Tensor) -> None:
        self.root = root
        self.interpreter = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        first, *others = _EXAMPLES
        self.sample = _examples(sample, first)
        self.made: Made = {}
        self.others = [(_examples(sample, count), dict[Node, Any]()) for count in others]
        self.has_other_sizes = False
        self.runs = False
        """Whether it runs now, so that modules are called and not traced."""

    def count(self, node: Node) -> int | None:
        """Of how many sizes or parts a node is, whatever the sizes of the inputs are; None where
        that is not known, or it is no sequence of such."""
        made = self._of_sample(node)
        if not isinstance(made, tuple | list):
            return None
        if all(isinstance(item, int) for item in made):
            return len(made)
        if function_name(node) in _COUNTED and isinstance(node.args[1], int):
            return len(made)
        return None

    def number(self, node: Node) -> bool | int | float | None:
        """The number that a node makes, where that and all that it is computed from are the same
        whatever the sizes of the inputs are; else None."""
        made = self._of_sample(node)
        if not isinstance(made, bool | int | float):
            return None
        numbers = _numbers_behind(node, self.made)
        for other in self._elsewhere():
            if any(other.get(one) != self.made[one] for one in numbers):
                return None
        return made

    def follows_inputs(self, node: Node) -> bool:
        """Whether a node makes a number, and another one of other inputs."""
        is_number = isinstance(self._of_sample(node), bool | int | float)
        return is_number and self.number(node) is None

    def _of_sample(self, node: Node) -> Any:
        """What a node makes of the sample; None if it cannot be run."""
        with suppress(RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            self._run(self.sample, self.made)
        return self.made.get(node)

    def _elsewhere(self) -> list[Made]:
        """What is made of other inputs, of those that the network takes so far."""
        if not self.has_other_sizes:
            self.has_other_sizes = True
            for inputs in of_other_sizes(self.sample, lambda other: self._run(other, {})):
                self.others.append((inputs, {}))
        taken = []
        for inputs, made in self.others:
            with suppress(Exception):  # of any kind: the network does not take them
                self._run(inputs, made)
                taken.append((inputs, made))
        self.others = taken
        return [made for _, made in taken]

    def _run(self, inputs: Tensor, made: Made) -> None:
        """Adds to `made` what the nodes make that are not in it."""
        self.runs = True
        try:
            with evaluating(self.root), torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.interpreter.run(inputs.clone(), initial_env=made)
        finally:
            self.runs = False


def _examples(sample: Tensor, count: int) -> Tensor:
    numbers = torch.arange(count) % len(sample)
    return sample[numbers]


def _numbers_behind(node: Node, made: Made) -> set[Node]:
    """The nodes that make numbers, and those numbers alone, which a node is computed from; itself
    too."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        value = made[one]
        if one in found or not isinstance(value, bool | int | float | tuple | list):
            continue
        found.add(one)
        if one.target is not operator.getitem:  # of a shape, one size alone
            waiting += one.all_input_nodes
    return found
