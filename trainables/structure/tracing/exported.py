"""The graph of a network that torch.fx cannot trace, by torch.export: of shapes alone, so that code
which chooses by shapes, optional arguments or types is seen through.

Its operations are those of torch's own library. Those of layers become calls of the network's
modules again, so that all that is known of layers holds for them.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.errors import first_line
from slimfront.trainables.inputs import Several, joined, tensors
from slimfront.trainables.precision import as_torch_has_it
from slimfront.trainables.structure.tracing.called_layers import inputs_of, layer_of
from slimfront.trainables.structure.tracing.constants import ConstantRun
from slimfront.trainables.structure.tracing.other_sizes import varying_axes
from slimfront.trainables.structure.tracing.returned import writable
from slimfront.trainables.torch_internals import (
    decides_by_values,
    fixes_the_batch,
    quiet_export,
    unflattened,
    writes_in_place,
)

_PLAIN: dict[str, Callable[..., Any]] = {
    "aten.relu.default": F.relu,
    "aten.relu_.default": F.relu,
    "aten.add.Tensor": operator.add,
    "aten.mul.Tensor": operator.mul,
    "aten.sub.Tensor": operator.sub,
    "aten.flatten.using_ints": torch.flatten,
    "aten.dropout.default": F.dropout,
    # How entries lie in memory follows from kernels, which differ between devices.
    "aten.view.default": torch.reshape,
    "aten.scaled_dot_product_attention.default": F.scaled_dot_product_attention,
    **{
        f"aten.__{name}__.{kind}": getattr(operator, f"{name}_" if name != "xor" else name)
        for name in ("and", "or", "xor")
        for kind in ("Tensor", "Scalar")
    },
}
"""Operations that are known by another name, with the same arguments."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CHECKS = ("_assert", "sym_constrain", "_guards_fn")


class CannotExport(Exception):
    """torch.export does not take a network."""


def exported(model: nn.Module, sample: Tensor) -> GraphModule:
    """The graph of a network in the mode that it is in, of its own modules and parameters.

    Args:
        sample: (N, *input_shape); the graph takes any number of inputs.

    Raises:
        CannotExport: if torch.export does not take the network, as where its code decides by the
            values of its inputs.
    """
    if _has_lengths(sample):
        with suppress(CannotExport):
            return _graph_of(model, sample, any_length=True)
    return _graph_of(model, sample, any_length=False)


def _has_lengths(sample: Tensor) -> bool:
    """Whether there are inputs that have several lengths, as sequences do."""
    return any(varying_axes(tensor) for tensor in tensors(sample).values())


def _graph_of(model: nn.Module, sample: Tensor, *, any_length: bool) -> GraphModule:
    """The graph, for sequences of any length as far as the network takes them, or of those of the
    sample."""
    with _own_statistics(model):
        program = _program(model, sample, any_length=any_length)
    try:
        return _as_graph(model, program, sample)
    except (KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise CannotExport(first_line(error)) from error


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    """Within, torch's batch norms go by the statistics that they have: those of the inputs, and
    what is counted of them in training mode, would be written out as operations. In the graph they
    are modules, which follow the mode that they are in."""
    norms = []
    for module in model.modules():
        if type(module) in _BATCH_NORMS and module.training and module.track_running_stats:
            norms.append(module)
    for norm in norms:
        norm.forward = partial(_normed, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normed(norm: Any, x: Tensor) -> Tensor:
    """A batch norm in evaluation mode, whatever mode it says that it is in."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def writes_elsewhere(traced: GraphModule) -> bool:
    """Whether an operation changes a tensor that is read again under another name: no graph shows
    that."""
    nodes = list(traced.graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    return any(_is_read_elsewhere(node, order) for node in nodes)


def _is_read_elsewhere(node: Node, order: Mapping[Node, int]) -> bool:
    """Whether a node changes a tensor that is read again under another name; `order` has the places
    of the nodes that may read it."""
    if not writes_in_place(node):
        return False
    written = node.args[0]
    if not isinstance(written, Node):
        return False
    if not node.users:
        return True
    return any(order[user] > order[node] for user in written.users)


class _Apart(nn.Module):
    """A network whose inputs come each as an argument."""

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)

    def forward(self, inputs: list[Tensor]) -> Any:
        """As the network's."""
        named = dict(zip(self.names, inputs, strict=True))
        if named.keys() == {""}:
            return self.network(named[""])
        return self.network(Several(named))


def _program(model: nn.Module, sample: Tensor, *, any_length: bool) -> torch.export.ExportedProgram:
    """What torch.export makes of a network, for any number of inputs."""
    while len(sample) < 3:
        sample = joined(sample, sample)
    sample = sample[:3]
    named = {"": sample}
    if isinstance(sample, Several):
        named = tensors(sample)
    inputs = list(named.values())
    batch = torch.export.Dim("batch", min=1)
    shapes: list[dict[int, Any]] = [{0: batch} for _ in inputs]
    if any_length:
        for tensor, sizes in zip(inputs, shapes, strict=True):
            sizes.update(dict.fromkeys(varying_axes(tensor), torch.export.Dim.AUTO))
    apart = _Apart(model, named)
    apart.training = model.training
    problem: Exception | None = None
    with quiet_export(), as_torch_has_it(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Strictly, which takes longer, torch reads the code itself, and sees through len(x).
        for strict in (False, True):
            try:
                program = torch.export.export(
                    apart,
                    args=(inputs,),
                    dynamic_shapes=(shapes,),
                    strict=strict,
                )
                return _without_writing(program)
            except Exception as error:  # torch raises many kinds
                problem = problem or error
                if not fixes_the_batch(error):
                    break
    assert problem is not None
    raise CannotExport(_in_words(problem))


def _in_words(error: Exception) -> str:
    """Why torch.export does not take a network, as far as it is known, in words of its author."""
    if fixes_the_batch(error):
        return (
            "it takes no other number of inputs at once than it was traced with; have its code "
            "take that from x.shape[0], and not go through inputs one by one"
        )
    if decides_by_values(error):
        return "its code decides by the values of its inputs"
    return first_line(error)


def _without_writing(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same without operations that change a tensor which is read again under another name."""
    traced = program.graph_module
    if not writes_elsewhere(traced):
        return program
    run = ConstantRun(traced, _constants(program))
    rest = run.not_constant()
    order = {node: place for place, node in enumerate(rest)}
    if run.is_whole and not any(_is_read_elsewhere(node, order) for node in rest):
        run.apply()
        return program
    anew: torch.export.ExportedProgram = program.run_decompositions({})  # which writes nowhere
    return anew


def _constants(program: torch.export.ExportedProgram) -> dict[Node, Tensor]:
    """The constants of an exported program, by their placeholders."""
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    kind = torch.export.graph_signature.InputKind.CONSTANT_TENSOR
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == kind:
            found[nodes[spec.arg.name]] = program.constants[spec.target]
    return found


def _as_graph(
    model: nn.Module, program: torch.export.ExportedProgram, sample: Tensor
) -> GraphModule:
    """An exported program with the network's own modules and parameters."""
    new = _NewGraph(model, program)
    new.add_inputs(sample)
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            new.add_outputs(node)
        elif not _is_check(node):
            new.add(node)
    used = new.used()
    network = GraphModule(used, new.graph)
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()
    network.training = model.training  # its modules are the model's, and stay in their modes
    return network


class _NewGraph:
    """A graph that is made from an exported program, node by node."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model = model
        self.program = program
        self.graph = fx.Graph()
        self.made: dict[Node, Node] = {}
        """The new node of each."""
        self.held: dict[str, Any] = dict(model.named_modules())
        """Modules, and tensors that are no parameters or buffers of the model's, by name."""
        self.device: Node | None = None

    def add_inputs(self, sample: Tensor) -> None:
        """Adds the inputs, parameters, buffers and constants."""
        inputs = self.graph.placeholder("inputs")
        names: Iterator[str] | None = None
        if isinstance(sample, Several):
            names = iter(tensors(sample))
        nodes = {node.name: node for node in self.program.graph_module.graph.nodes}
        user_input = torch.export.graph_signature.InputKind.USER_INPUT
        held: dict[Node, Node] = {}
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind != user_input:
                held[node] = self._held(spec.target)
            elif names is None:
                self.made[node] = inputs
            else:
                self.made[node] = self.graph.call_function(
                    operator.getitem,
                    args=(inputs, next(names)),
                )
        # Behind the inputs: what follows asks the first of all for its device.
        self.made.update(held)

    def _held(self, target: str | None) -> Node:
        """The node of a parameter, buffer or constant."""
        assert target is not None
        name = target.removeprefix("network.")
        constants = self.program.constants
        is_held_by_model = target in self.program.state_dict
        if target in constants and not is_held_by_model:
            value = constants[target]
            if isinstance(value, Tensor):
                value = value.detach()
            self.held[name] = value
        return self.graph.get_attr(name)

    def add(self, node: Node) -> None:
        """Adds what a node does."""
        if node.op == "get_attr":
            name = str(node.target)
            self.held[name] = getattr(self.program.graph_module, name)
            self.made[node] = self.graph.get_attr(name)
            return
        if "device" in node.kwargs and self.device is None:
            self.device = self._device_of_inputs()
        self.made[node] = self._copied(node)

    def _device_of_inputs(self) -> Node:
        inputs = list(self.made.values())
        first = inputs[0]
        return self.graph.call_function(getattr, (first, "device"))

    def _copied(self, node: Node) -> Node:
        """A node in the new graph: a call of a layer, or the same operation."""
        given = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(given, self.made.__getitem__)
        layer = layer_of(node, args, self.held)
        if layer is not None:
            return self.graph.call_module(layer, inputs_of(node, args))
        if str(node.target) == "aten.copy.default":  # which has no derivative
            into, source = args[:2]
            typed = self.graph.call_method("type_as", (source, into))
            return self.graph.call_method("expand_as", (typed, into))
        plain = _PLAIN.get(str(node.target))
        takes_kwargs = plain is F.scaled_dot_product_attention
        has_same_arguments = takes_kwargs or not kwargs
        if plain is not None and has_same_arguments:
            return self.graph.call_function(plain, args, kwargs)
        kwargs = dict(kwargs)
        if "device" in kwargs:
            kwargs["device"] = self.device
        kwargs.pop("pin_memory", None)
        return self.graph.create_node(
            op=node.op,
            target=node.target,
            args=args,
            kwargs=kwargs,
            name=node.name,
        )

    def add_outputs(self, node: Node) -> None:
        """Adds what the network returns, in its structure."""
        outputs: Any = node.args[0]
        written = _written_buffers(self.program)
        given = []
        for output in outputs[written:]:
            given.append(self.made[output])
        structure = self.program.call_spec.out_spec
        assert structure is not None
        returned = unflattened(given, structure)
        self.graph.output(writable(self.graph, returned))

    def used(self) -> dict[str, Any]:
        """The modules and tensors that the graph uses, by name; what reads a tensor for nobody is
        taken out of it."""
        found = {}
        for node in reversed(self.graph.nodes):
            if node.op not in ("get_attr", "call_module"):
                continue
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
                continue
            name = str(node.target)
            found[name] = self._of_name(name)
        return found

    def _of_name(self, name: str) -> Any:
        if name in self.held:
            return self.held[name]
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        return getattr(module, leaf)


def _written_buffers(program: torch.export.ExportedProgram) -> int:
    """How many outputs stand for buffers that are written to; they come first."""
    user_output = torch.export.graph_signature.OutputKind.USER_OUTPUT
    count = 0
    for spec in program.graph_signature.output_specs:
        if spec.kind != user_output:
            count += 1
    return count


def _is_check(node: Node) -> bool:
    target = node.target
    name = getattr(target, "__name__", str(target))
    return any(check in name for check in _CHECKS)
