"""The traced network that is made compact: of plain modules, and in training mode what the model is
in training mode.

torch.fx writes what `self.training` was into the graph. So the model is traced in both modes. Where
they differ by dropout alone, the graph gets modules for it, which follow the mode that they are in;
where they differ otherwise, the compact network stays what the model is in evaluation mode, and a
warning names the module whose code it is.
"""

import copy
import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from slimfront.trainables.compaction.computed_weights import compute_weights
from slimfront.trainables.compaction.layers import set_module
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.attention_modules import ScaledDotProduct
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import Conv, submodule, trace
from slimfront.trainables.structure.tracing.encoders import plain_kind
from slimfront.trainables.tasks.evaluating import evaluating

log = logging.getLogger(__name__)

_DROPOUTS: dict[object, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    torch.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    torch.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_ON_BY_DEFAULT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_CONVS: dict[object, type[Conv]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_ARGUMENTS: dict[object, tuple[str, ...]] = {
    **dict.fromkeys(_DROPOUTS, ("input", "p", "training", "inplace")),
    torch.dropout: ("input", "p", "train"),
    torch.alpha_dropout: ("input", "p", "train"),
    torch.feature_alpha_dropout: ("input", "p", "train"),
    F.scaled_dot_product_attention: (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ),
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(_CONVS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.batch_norm: (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def traced_in_both_modes(model: nn.Module, sample: Tensor | None = None) -> fx.GraphModule:
    """A traced copy of the model in evaluation mode, whose dropout follows the mode that it is in.

    With a `sample` (N, *input_shape) a network that torch.fx cannot trace is exported.

    Raises:
        UserError: if the model cannot be traced.
    """
    if isinstance(model, fx.GraphModule):
        return copied(model).eval()
    model = _with_plain_weights(model)
    with evaluating(model):
        evaluated = copied(trace(model, sample)).eval()
    as_modules(evaluated)
    # Whose statistics an inlined batch norm may count on while it is traced.
    other = copied(model).train()
    try:
        with torch.random.fork_rng(devices=[]):
            trained = copied(trace(other, sample))
        as_modules(trained)
        followed = _follow_mode(trained)
        apart = _first_difference(evaluated, trained, followed)
    except UserError:
        apart, followed = "", set()
    if apart is not None:
        log.warning(
            "the compact network stays as in evaluation mode when it is trained further: in "
            "training mode %s does something "
            "else, which compaction cannot keep; have a module of torch.nn do it, or leave refit "
            "out",
            apart or f"{type(model).__name__}.forward",
        )
    if apart is not None or not followed:
        return evaluated
    state = evaluated.state_dict()
    trained.load_state_dict(state)
    return trained.eval()


def _with_plain_weights(model: nn.Module) -> nn.Module:
    """The model, or a copy of it whose weights are what its parametrisations compute now."""
    if not any(is_parametrized(module) for module in model.modules()):
        return model
    plain = copied(model)
    for module in list(plain.modules()):
        if is_parametrized(module):
            _compute_weights(module)
    return plain


def _compute_weights(module: nn.Module) -> None:
    """Makes a module's parametrised weights plain ones, in place.

    torch's own way takes the weight off the class, which copies of the module share.
    """
    weights = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    kind = type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight.clone()))


def as_modules(network: fx.GraphModule) -> None:
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
        made = _module_for(network, node) if node.op == "call_function" else None
        if made is not None:
            _call_instead(network, node, made)
            changed = True
    if changed:
        network.graph.eliminate_dead_code()
        network.recompile()


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = _ARGUMENTS[node.target]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _module_for(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that does what a function does with parameters and buffers of the network; None if
    there is none."""
    if node.target not in (F.linear, *_CONVS, F.layer_norm, F.batch_norm):
        return None
    given = _arguments(node)
    others = [value for name, value in given.items() if name not in ("input", *_TENSORS)]
    if not isinstance(given.get("input"), fx.Node):
        return None
    if any(isinstance(value, fx.Node) for value in others):
        return None
    found = _tensors_of(network, given)
    module = None if found is None else _built(node, given, found)
    if found is None or module is None:
        return None
    for name, value in found.items():
        setattr(module, name, value)
    return module.train(network.training)


def _tensors_of(network: fx.GraphModule, given: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters and buffers among the arguments of a function; None if one is computed."""
    found: dict[str, Any] = {}
    for name in _TENSORS:
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        found[name] = _read(network, str(value.target))
        if not name.startswith("running") and not isinstance(found[name], nn.Parameter):
            return None
    return found


def _built(node: fx.Node, given: dict[str, Any], found: dict[str, Any]) -> nn.Module | None:
    with torch.device("meta"):
        if node.target is F.layer_norm:
            affine = "weight" in found
            if "bias" in found and not affine:
                return None
            shape, eps = given["normalized_shape"], given.get("eps", 1e-5)
            return nn.LayerNorm(tuple(shape), eps, affine, bias="bias" in found)
        if node.target is F.batch_norm:
            return _batch_norm(node, given, found)
        weight = found.get("weight")
        if weight is None:
            return None
        has_bias = "bias" in found
        if node.target is F.linear:
            return nn.Linear(weight.shape[1], weight.shape[0], has_bias)
        groups = given.get("groups", 1)
        options = {
            name: given.get(name, default)
            for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        }
        outputs, inputs, *kernel = weight.shape
        return _CONVS[node.target](
            inputs * groups, outputs, tuple(kernel), **options, groups=groups, bias=has_bias
        )


def _batch_norm(node: fx.Node, given: dict[str, Any], found: dict[str, Any]) -> nn.Module | None:
    """The batch norm whose own code calls the function: another's number of axes is not known."""
    owner = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))[1]
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kind = next(
        (kind for kind in kinds if inspect.isclass(owner) and issubclass(owner, kind)), None
    )
    if kind is None or set(found) != set(_TENSORS):
        return None
    norm: nn.Module = kind(
        len(found["running_mean"]), eps=given.get("eps", 1e-5), momentum=given.get("momentum", 0.1)
    )
    norm.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device="cpu"))
    return norm


def _call_instead(network: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Calls a module in the place of a function, by the name of what holds its parameters, where
    that has no other use."""
    given = _arguments(node)
    tensors = [given[name] for name in _TENSORS if isinstance(given.get(name), fx.Node)]
    owner = str(tensors[0].target).rpartition(".")[0] if tensors else ""
    name = owner if owner and _serves_alone(network, owner, node) else _new_name(network, node.name)
    targets = {str(tensor.target) for tensor in tensors}
    if name == owner:
        set_module(network, name, module)
    else:
        network.add_submodule(name, module)
    with network.graph.inserting_before(node):
        called = network.graph.call_module(name, (given["input"],))
    called.meta = copy.copy(node.meta)
    node.replace_all_uses_with(called)
    network.graph.erase_node(node)
    for tensor in set(tensors):
        if not tensor.users:
            network.graph.erase_node(tensor)
    still = {str(each.target) for each in network.graph.nodes if each.op == "get_attr"}
    for target in targets - still:
        holder, _, leaf = target.rpartition(".")
        if name != owner and not _is_called(network, holder):
            delattr(network.get_submodule(holder), leaf)


def _serves_alone(network: fx.GraphModule, owner: str, node: fx.Node) -> bool:
    """Whether only this node reads what is in a module that no node calls, and which has no
    parts."""
    readers = {
        user
        for each in network.graph.nodes
        if each.op == "get_attr" and _holder(each) == owner
        for user in each.users
    }
    return (
        readers == {node}
        and not _is_called(network, owner)
        and not list(submodule(network, owner).children())
    )


def _holder(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


def _is_called(network: fx.GraphModule, name: str) -> bool:
    return any(node.op == "call_module" and node.target == name for node in network.graph.nodes)


def _new_name(network: fx.GraphModule, wanted: str) -> str:
    name, number = wanted, 0
    while hasattr(network, name):
        name, number = f"{wanted}_{number}", number + 1
    return name


def _read(network: fx.GraphModule, target: str) -> Any:
    holder, _, leaf = target.rpartition(".")
    return getattr(network.get_submodule(holder), leaf)


def _follow_mode(network: fx.GraphModule) -> set[str]:
    """Has modules do the dropout that functions do in a network traced in training mode, in place;
    the names of the modules."""
    made: set[str] = set()
    for node in list(network.graph.nodes):
        module, inputs = _dropout_for(node)
        if module is None:
            continue
        name = _new_name(network, node.name)
        network.add_submodule(name, module)
        with network.graph.inserting_before(node):
            called = network.graph.call_module(name, inputs)
        called.meta = copy.copy(node.meta)
        node.replace_all_uses_with(called)
        network.graph.erase_node(node)
        made.add(name)
    if made:
        network.recompile()
    return made


def _dropout_for(node: fx.Node) -> tuple[nn.Module | None, tuple[Any, ...]]:
    """The module that does a function's dropout, and what it is called with; None where the
    function does none."""
    if node.op != "call_function" or node.target not in (
        *_DROPOUTS,
        F.scaled_dot_product_attention,
    ):
        return None, ()
    given = _arguments(node)
    if node.target is F.scaled_dot_product_attention:
        dropout, causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
        plain = (
            isinstance(dropout, float | int)
            and isinstance(causal, bool)
            and isinstance(given.get("scale"), float | None)
        )
        if not plain or dropout == 0:
            return None, ()
        mask = () if given.get("attn_mask") is None else (given["attn_mask"],)
        module: nn.Module = ScaledDotProduct(
            float(dropout), causal, given.get("scale"), bool(given.get("enable_gqa", False))
        )
        return module, (given["query"], given["key"], given["value"], *mask)
    if not _is_on(node) or not isinstance(given.get("p", 0.5), float | int):
        return None, ()
    return _DROPOUTS[node.target](given.get("p", 0.5)), (given["input"],)


def _is_on(node: fx.Node) -> bool:
    given = _arguments(node)
    return given.get("p", 0.5) != 0 and bool(
        given.get("training", given.get("train", node.target in _ON_BY_DEFAULT))
    )


def _first_difference(
    evaluated: fx.GraphModule, trained: fx.GraphModule, followed: set[str]
) -> str | None:
    """What does something else in training mode, dropout apart: a module's name and kind, "" for
    the network's own code."""
    one, other = _steps(evaluated, set()), _steps(trained, followed)
    for mine, theirs in zip(one, other, strict=False):
        if mine[0] != theirs[0]:
            return _place(theirs[1]) or _place(mine[1])
    rest = one[len(other) :] or other[len(one) :]
    return _place(rest[0][1]) if rest else None


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", None)
    return f"'{path}' ({getattr(kind, '__name__', kind)})" if path else ""


def _steps(network: fx.GraphModule, followed: set[str]) -> list[tuple[object, fx.Node]]:
    """What a graph does, step by step, with dropout left out."""
    numbers: dict[fx.Node, str] = {}
    steps: list[tuple[object, fx.Node]] = []

    def number(node: fx.Node) -> Any:
        return _Number(numbers[node])

    for node in network.graph.nodes:
        if not node.users and node.op not in ("output", "placeholder"):
            continue
        module = _followed_module(network, node, followed)
        if _is_dropout(node, module):
            source = node.args[0] if node.args else node.kwargs["input"]
            assert isinstance(source, fx.Node)
            numbers[node] = numbers[source]
            continue
        op, target, values = _call(node, module)
        step = (op, target, repr(fx.node.map_arg(values, number)))
        numbers[node] = str(len(steps))
        steps.append((step, node))
    return steps


def _followed_module(
    network: fx.GraphModule, node: fx.Node, followed: set[str]
) -> nn.Module | None:
    """The module that stands for a call which goes by the mode; None for other nodes."""
    if node.op != "call_module" or str(node.target) not in followed:
        return None
    return submodule(network, str(node.target))


def _is_known_function(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _ARGUMENTS


def _is_dropout(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node passes on what it gets: dropout as a module, or a function that is off."""
    if module is not None:
        return not isinstance(module, ScaledDotProduct)
    return _is_known_function(node) and node.target in _DROPOUTS and not _is_on(node)


def _call(node: fx.Node, module: nn.Module | None) -> tuple[str, object, Any]:
    """What a node does, and with what; attention as a function, without its dropout."""
    attention = F.scaled_dot_product_attention
    if isinstance(module, ScaledDotProduct):
        given = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False))
        return "call_function", attention, _attended(given | module.options())
    if not _is_known_function(node):
        return node.op, node.target, (node.args, dict(node.kwargs))
    arguments = _arguments(node)
    if node.target is attention:
        arguments = _attended(arguments)
    return node.op, node.target, arguments


def _attended(arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    return {
        name: value for name, value in sorted((defaults | arguments).items()) if name != "dropout_p"
    }


class _Number(str):
    """The number of a step, in the place of its node."""
