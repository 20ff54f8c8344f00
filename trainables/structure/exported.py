"""The graph of a network that torch.fx cannot trace, by torch.export: of shapes alone, so that code
which chooses by shapes, optional arguments or types is seen through.

Its operations are those of torch's own library. Those of layers become calls of the network's
modules again, so that all that is known of layers holds for them.
"""

import copy
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.errors import first_line
from slimfront.trainables.inputs import Several, joined, tensors
from slimfront.trainables.precision import as_torch_has_it
from slimfront.trainables.structure.encoders import plain_kind
from slimfront.trainables.torch_internals import (
    function_name,
    quiet_export,
    unflattened,
    writes_in_place,
)

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv1d": (nn.Conv1d,),
    "conv2d": (nn.Conv2d,),
    "conv3d": (nn.Conv3d,),
    "conv_transpose1d": (nn.ConvTranspose1d,),
    "conv_transpose2d": (nn.ConvTranspose2d,),
    "conv_transpose3d": (nn.ConvTranspose3d,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "layer_norm": (nn.LayerNorm,),
    "rms_norm": (nn.RMSNorm,),
    "group_norm": (nn.GroupNorm,),
    "embedding": (nn.Embedding,),
    "prelu": (nn.PReLU,),
}
"""Which kinds of modules do one operation with parameters of theirs."""
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
_CHECKS = ("_assert", "sym_constrain", "_guards_fn")


class CannotExport(Exception):
    """torch.export does not take a network."""


def exported(model: nn.Module, sample: Tensor) -> fx.GraphModule:
    """The graph of a network in the mode that it is in, of its own modules and parameters.

    Args:
        sample: (N, *input_shape); the graph takes any number of inputs.

    Raises:
        CannotExport: if torch.export does not take the network, as where its code decides by the
            values of its inputs.
    """
    program = _program(model, sample)
    try:
        return _as_graph(model, program, sample)
    except (KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise CannotExport(first_line(error)) from error


def writes_elsewhere(traced: fx.GraphModule) -> bool:
    """Whether an operation changes a tensor that is read again under another name: no graph shows
    that."""
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        if not writes_in_place(node) or not isinstance(node.args[0], fx.Node):
            continue
        later = [user for user in node.args[0].users if order[user] > order[node]]
        if later or not node.users:
            return True
    return False


class _Apart(nn.Module):
    """A network whose inputs come each as an argument."""

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)

    def forward(self, inputs: list[Tensor]) -> Any:
        """As the network's."""
        named = dict(zip(self.names, inputs, strict=True))
        return self.network(Several(named) if named.keys() != {""} else named[""])


def _program(model: nn.Module, sample: Tensor) -> torch.export.ExportedProgram:
    while len(sample) < 3:
        sample = joined(sample, sample)
    sample = sample[:3]
    named = tensors(sample) if isinstance(sample, Several) else {"": sample}
    batch = torch.export.Dim("batch", min=1)
    shapes = ([{0: batch} for _ in named],)
    apart = _Apart(model, named)
    apart.training = model.training
    with quiet_export(), as_torch_has_it(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(apart, (list(named.values()),), dynamic_shapes=shapes)
            if writes_elsewhere(program.graph_module):
                program = program.run_decompositions({})  # which writes nowhere
            return program
        except Exception as error:  # torch raises many kinds
            raise CannotExport(first_line(error)) from None


def _as_graph(
    model: nn.Module, program: torch.export.ExportedProgram, sample: Tensor
) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = graph.placeholder("inputs")
    held: dict[str, Any] = dict(model.named_modules())
    made = _placeholders(graph, inputs, program, sample, held)
    device = None
    outputs: tuple[Any, ...] = ()
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" or _is_check(node):
            continue
        if node.op == "output":
            outputs = node.args[0]
        elif node.op == "get_attr":
            held[str(node.target)] = getattr(program.graph_module, str(node.target))
            made[node] = graph.get_attr(str(node.target))
        else:
            if "device" in node.kwargs and device is None:
                device = graph.call_function(getattr, (next(iter(made.values())), "device"))
            made[node] = _copied(graph, node, made, device, held)
    given = [made[output] for output in outputs[_mutated(program) :]]
    assert program.call_spec.out_spec is not None
    graph.output(unflattened(given, program.call_spec.out_spec))
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    network = fx.GraphModule({name: _target(model, held, name) for name in used}, graph)
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()
    network.training = model.training  # its modules are the model's, and stay in their modes
    return network


def _target(model: nn.Module, held: dict[str, Any], name: str) -> Any:
    if name in held:
        return held[name]
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _placeholders(
    graph: fx.Graph,
    inputs: fx.Node,
    program: torch.export.ExportedProgram,
    sample: Tensor,
    held: dict[str, Any],
) -> dict[fx.Node, fx.Node]:
    """The inputs, parameters, buffers and constants of an exported program in the new graph."""
    names = iter(tensors(sample)) if isinstance(sample, Several) else None
    places = {node.name: node for node in program.graph_module.graph.nodes}
    made: dict[fx.Node, fx.Node] = {}
    for spec in program.graph_signature.input_specs:
        node = places[spec.arg.name]
        if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
            name = None if names is None else next(names)
            item = inputs if name is None else graph.call_function(operator.getitem, (inputs, name))
            made[node] = item
            continue
        assert spec.target is not None
        name = spec.target.removeprefix("network.")
        if spec.target in program.constants and spec.target not in program.state_dict:
            name = name.replace(".", "_") if "." not in name else name
            held[name] = _buffer(program.constants[spec.target])
        made[node] = graph.get_attr(name)
    # Inputs first: what follows asks one of them for its device.
    return dict(sorted(made.items(), key=lambda pair: pair[1].op == "get_attr"))


def _buffer(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _mutated(program: torch.export.ExportedProgram) -> int:
    """How many outputs stand for buffers that are written to; they come first."""
    user = torch.export.graph_signature.OutputKind.USER_OUTPUT
    return sum(spec.kind != user for spec in program.graph_signature.output_specs)


def _is_check(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return any(check in name for check in _CHECKS)


def _copied(
    graph: fx.Graph,
    node: fx.Node,
    made: dict[fx.Node, fx.Node],
    device: fx.Node | None,
    held: dict[str, Any],
) -> fx.Node:
    """A node in the new graph: a call of a layer, or the same operation."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: made[source])
    layer = _layer_of(node, args, held)
    if layer is not None:
        where = 1 if function_name(node) == "embedding" else 0
        return graph.call_module(layer, (args[where],))
    plain = _PLAIN.get(str(node.target))
    if plain is not None and (not kwargs or plain is F.scaled_dot_product_attention):
        return graph.call_function(plain, args, kwargs)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": device}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    return graph.create_node(node.op, node.target, args, kwargs, node.name)


def _layer_of(node: fx.Node, args: Any, held: dict[str, Any]) -> str | None:
    """The module which does an operation: one of that kind, with these parameters and settings;
    None if there is none."""
    kinds = _LAYERS.get(function_name(node))
    if kinds is None:
        return None
    where = 1 if function_name(node) == "embedding" else 0
    others = [a for place, a in enumerate(args) if isinstance(a, fx.Node) and place != where]
    names = [str(other.target) for other in others if other.op == "get_attr"]
    owners = {name.rpartition(".")[0] for name in names}
    if len(owners) != 1 or len(names) < len(others):
        return None
    owner = owners.pop()
    module = held.get(owner)
    if not isinstance(module, kinds) or not _does(module, names, function_name(node), args):
        return None
    if plain_kind(module) not in kinds:  # its own code calls the operation, with its parameters
        plain = copy.copy(module)
        plain.__class__ = next(kind for kind in kinds if isinstance(module, kind))
        held[owner] = plain
    return owner


_CONV_SETTINGS = (("stride", 3), ("padding", 4), ("dilation", 5), ("groups", 6))
_TRANSPOSED_SETTINGS = (
    *(("stride", 3), ("padding", 4), ("output_padding", 5)),
    *(("groups", 6), ("dilation", 7)),
)
_SETTINGS: dict[str, tuple[tuple[str, int], ...]] = {
    **{f"conv{n}d": _CONV_SETTINGS for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED_SETTINGS for n in (1, 2, 3)},
    "layer_norm": (("normalized_shape", 1), ("eps", 4)),
    "rms_norm": (("normalized_shape", 1), ("eps", 3)),
    "group_norm": (("num_groups", 1), ("eps", 4)),
    "batch_norm": (("eps", 7),),
}
"""Where the settings of a layer stand among the arguments of its operation."""
_DEFAULTS: dict[str, Any] = {
    **{"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0},
    "eps": 1e-5,
}


def _does(module: nn.Module, names: list[str], operation: str, args: Any) -> bool:
    """Whether a module has all of these parameters and no others, and its operation's settings."""
    tensors_of = {*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)}
    own = {leaf for leaf, tensor in tensors_of if tensor.dim() > 0}
    if own != {name.rpartition(".")[2] for name in names}:
        return False
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    for setting, place in _SETTINGS.get(operation, ()):
        given = args[place] if len(args) > place else _DEFAULTS.get(setting)
        if not _equal(getattr(module, setting), given):
            return False
    return True


def _equal(own: Any, given: Any) -> bool:
    """Whether two settings are the same: one number stands for as many as there are axes."""
    if isinstance(own, str) or isinstance(given, str) or own is None or given is None:
        return bool(own == given)
    if not isinstance(own, tuple | list) and not isinstance(given, tuple | list):
        return bool(own == given)
    ones, others = (
        [side] if not isinstance(side, tuple | list) else list(side) for side in (own, given)
    )
    if len(ones) == 1 or len(others) == 1:
        return len({*ones, *others}) == 1
    return ones == others
