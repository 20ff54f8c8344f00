"""What makes 0 of 0: which operations a tensor of zeros passes through unchanged."""

from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.torch_internals import function_name

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Hardshrink),
    nn.Softshrink,
)
_ACTIVATION_NAMES = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"),
        *("mish", "hardswish", "tanh", "softsign", "tanhshrink", "hardshrink", "softshrink"),
    )
)
_PASSING: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
_PASSING_NAMES = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "to", "float"),
        *("type_as", "view", "reshape", "_unsafe_view", "permute", "transpose", "flatten"),
        *("unflatten", "squeeze", "unsqueeze", "movedim", "getitem", "roll", "neg", "double"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "pixel_shuffle"),
        *("narrow", "slice", "select", "div", "truediv", "chunk", "split", "unbind", "half"),
    )
)
"""What moves, repeats, averages or scales entries by something else."""


def is_activation(graph: GraphModule, node: object) -> bool:
    """Whether a node applies an activation that makes 0 of 0, and of nothing else a constant."""
    return _is(graph, node, ACTIVATIONS, _ACTIVATION_NAMES)


def passes_zeros(graph: GraphModule, node: object) -> bool:
    """Whether a node makes zeros of a first argument that is all zeros."""
    if is_activation(graph, node):
        return True
    return _is(graph, node, _PASSING, _PASSING_NAMES)


def passes_units(graph: GraphModule, node: object) -> bool:
    """Whether a node leaves each entry where it is, and 0 where it was."""
    kinds = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    names = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone"))
    return _is(graph, node, kinds, names)


def _is(
    graph: GraphModule,
    node: object,
    kinds: tuple[type[nn.Module], ...],
    names: frozenset[str],
) -> bool:
    if not isinstance(node, Node):
        return False
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, kinds)
    if node.op not in ("call_function", "call_method"):
        return False
    return function_name(node) in names
