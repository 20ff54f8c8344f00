"""Activations that work on each number alone, and what they make of a number."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.torch_internals import function_name

_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardsigmoid),
    *(nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold),
)
_NAMES = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
        *("hardswish", "hardtanh", "tanh", "sigmoid", "softplus", "softsign", "hardsigmoid"),
        *("logsigmoid", "log_sigmoid", "softshrink", "hardshrink", "tanhshrink", "threshold"),
    )
)
"""The same as functions, as methods, and as torch.export writes them."""


def is_elementwise(graph: GraphModule, node: Node) -> bool:
    """Whether a node is an activation that works on each number alone, all of them alike."""
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, _MODULES)
    if node.op not in ("call_function", "call_method"):
        return False
    return function_name(node) in _NAMES and len(node.all_input_nodes) == 1


def activated(graph: GraphModule, activations: Iterable[Node], numbers: Tensor) -> Tensor:
    """What these activations make of numbers, one after another; `numbers` stay as they are."""
    made = numbers.clone()
    for node in activations:
        module = module_of(graph, node)
        if module is not None:
            made = module(made)
            continue
        _, *others = node.args or (None,)
        function = getattr(made, str(node.target)) if node.op == "call_method" else None
        if function is not None:
            made = function(*others, **node.kwargs)
        else:
            keywords = {key: value for key, value in node.kwargs.items() if key != "input"}
            made = node.target(made, *others, **keywords)  # type: ignore[operator]
    return made
