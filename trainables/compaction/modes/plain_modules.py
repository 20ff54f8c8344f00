"""Modules of torch.nn in the place of their subclasses, and of functions on parameters, where they
compute the same."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import delete_tensor, set_module
from slimfront.trainables.compaction.modes.arguments import CONVS, Arguments, arguments_of
from slimfront.trainables.compaction.modes.computed_weights import compute_weights
from slimfront.trainables.compaction.modes.replacing import add_module, replace_call
from slimfront.trainables.structure.graph import submodule, tensor_at
from slimfront.trainables.structure.tracing.encoders import plain_kind

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_LAYERS = (F.linear, *CONVS, F.layer_norm, F.batch_norm)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Tensors = dict[str, Any]
"""The parameters and buffers that a function is called with, by the names of its arguments."""


def as_modules(network: GraphModule) -> None:
    """Makes subclasses of torch's modules that compute what those do the modules that they are, and
    functions on parameters too.

    In place, on a network that shares its modules with no other.
    """
    for module in network.modules():
        kind = plain_kind(module)
        if kind is not None and kind is not type(module):
            module.__class__ = kind
    changed = compute_weights(network)
    for node in list(network.graph.nodes):
        made = _module_for(network, node)
        if made is not None:
            _call_instead(network, node, made)
            changed = True
    if changed:
        network.graph.eliminate_dead_code()
        network.recompile()


def _module_for(network: GraphModule, node: Node) -> nn.Module | None:
    """The module that does what a function does with parameters and buffers of the network; None if
    there is none."""
    if node.op != "call_function":
        return None
    if node.target not in _LAYERS:
        return None
    given = arguments_of(node)
    if not isinstance(given.get("input"), Node):
        return None
    if _has_computed_options(given):
        return None
    found = _tensors_of(network, given)
    if found is None:
        return None
    module = _built(node, given, found)
    if module is None:
        return None
    for name, value in found.items():
        setattr(module, name, value)
    return module.train(network.training)


def _has_computed_options(given: Arguments) -> bool:
    """Whether the network computes an argument that a module would have as a setting."""
    for name, value in given.items():
        is_option = name not in ("input", *_TENSORS)
        if is_option and isinstance(value, Node):
            return True
    return False


def _tensors_of(network: GraphModule, given: Arguments) -> Tensors | None:
    """The parameters and buffers among the arguments of a function; None if one is computed."""
    found: Tensors = {}
    for name in _TENSORS:
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, Node):
            return None
        if value.op != "get_attr":
            return None
        tensor = tensor_at(network, str(value.target))
        is_statistic = name.startswith("running")
        if not is_statistic and not isinstance(tensor, nn.Parameter):
            return None
        found[name] = tensor
    return found


def _built(node: Node, given: Arguments, found: Tensors) -> nn.Module | None:
    """The module of a function, its tensors still without memory; None if there is none."""
    with torch.device("meta"):
        if node.target is F.layer_norm:
            return _layer_norm(given, found)
        if node.target is F.batch_norm:
            return _batch_norm(node, given, found)
        if "weight" not in found:
            return None
        if node.target is F.linear:
            return _linear(found)
        return _convolution(CONVS[node.target], given, found)


def _layer_norm(given: Arguments, found: Tensors) -> nn.Module | None:
    has_weight = "weight" in found
    has_bias = "bias" in found
    if has_bias and not has_weight:
        return None
    return nn.LayerNorm(
        normalized_shape=tuple(given["normalized_shape"]),
        eps=given.get("eps", 1e-5),
        elementwise_affine=has_weight,
        bias=has_bias,
    )


def _linear(found: Tensors) -> nn.Module | None:
    """None for a product with one vector, which has no outputs of its own."""
    weight = found["weight"]
    if weight.dim() != 2:
        return None
    outputs, inputs = weight.shape
    return nn.Linear(inputs, outputs, bias="bias" in found)


def _convolution(kind: Any, given: Arguments, found: Tensors) -> nn.Module:
    outputs, inputs_of_group, *kernel = found["weight"].shape
    groups = given.get("groups", 1)
    convolution: nn.Module = kind(
        inputs_of_group * groups,
        outputs,
        tuple(kernel),
        stride=given.get("stride", 1),
        padding=given.get("padding", 0),
        dilation=given.get("dilation", 1),
        groups=groups,
        bias="bias" in found,
    )
    return convolution


def _batch_norm(node: Node, given: Arguments, found: Tensors) -> nn.Module | None:
    """The batch norm whose own code calls the function: another's number of axes is not known."""
    kind = _batch_norm_around(node)
    if kind is None or set(found) != set(_TENSORS):
        return None
    norm = kind(
        len(found["running_mean"]),
        eps=given.get("eps", 1e-5),
        momentum=given.get("momentum", 0.1),
    )
    batches = torch.zeros((), dtype=torch.long, device="cpu")
    norm.register_buffer("num_batches_tracked", batches)
    return norm


def _batch_norm_around(node: Node) -> type[nn.Module] | None:
    """The kind of batch norm whose code a node stands in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    _, owner = next(reversed(stack.values()))
    if not inspect.isclass(owner):
        return None
    for kind in _BATCH_NORMS:
        if issubclass(owner, kind):
            return kind
    return None


def _call_instead(network: GraphModule, node: Node, module: nn.Module) -> None:
    """Calls a module in the place of a function, by the name of what holds its parameters, where
    that has no other use."""
    given = arguments_of(node)
    values = [given.get(name) for name in _TENSORS]
    tensors = [value for value in values if isinstance(value, Node)]
    owner = ""
    if tensors:
        owner = _holder(tensors[0])
    takes_place = owner != "" and _serves_alone(network, owner, node)
    if takes_place:
        set_module(network, owner, module)
        name = owner
    else:
        name = add_module(network, node.name, module)
    replace_call(network, node, name, (given["input"],))
    for tensor in set(tensors):
        if not tensor.users:
            network.graph.erase_node(tensor)
    if not takes_place:
        _delete_unread(network, {str(tensor.target) for tensor in tensors})


def _delete_unread(network: GraphModule, targets: set[str]) -> None:
    """Takes parameters and buffers out of the network that neither its code nor a module that it
    calls reads."""
    for node in network.graph.nodes:
        if node.op == "get_attr":
            targets.discard(str(node.target))
    for target in targets:
        holder, _, _ = target.rpartition(".")
        if not _is_called(network, holder):
            delete_tensor(network, target)


def _serves_alone(network: GraphModule, owner: str, node: Node) -> bool:
    """Whether only this node reads what is in a module that no node calls, and which has no
    parts."""
    readers: set[Node] = set()
    for each in network.graph.nodes:
        if each.op == "get_attr" and _holder(each) == owner:
            readers.update(each.users)
    if readers != {node}:
        return False
    if _is_called(network, owner):
        return False
    parts = submodule(network, owner).children()
    return not list(parts)


def _holder(node: Node) -> str:
    """The name of the module that holds what a node reads."""
    holder, _, _ = str(node.target).rpartition(".")
    return holder


def _is_called(network: GraphModule, name: str) -> bool:
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        if node.target == name:
            return True
    return False
