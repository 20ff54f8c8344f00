"""Half of a network's units zeroed, by what Torch-Pruning knows of it, and Torch-Pruning alone.

What is zeroed depends on nothing of slimfront: where Torch-Pruning can analyse a network, all that
writes half of the channels of each of its groups; elsewhere half of the outputs of each layer.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from slimfront.trainables.inputs import Call
from slimfront.trainables.models import adapted
from slimfront.trainables.structure.copying import copied

Zeros = dict[str, list[tuple[int, list[int]]]]
"""By the name of a parameter: axes, and places along them where it is to be zero."""

SHARE = 0.5
"""So much of each group goes."""
_LAST = 3
"""Of so many layers that run last, those as wide as the outputs make them."""
_WEIGHTS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TURNED = "Conv1D"
"""The class of transformers' linear layers whose weight is (inputs, outputs)."""
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
_WITH_CELLS = (*_RECURRENT, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads",)
_QUERIES = ("qkv", "query", "q_proj", "q_lin", "q")
_KEYS_VALUES = ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "k", "v")


def by_groups(network: nn.Module, call: Call, inputs: Tensor) -> Zeros:
    """All that writes the channels that Torch-Pruning would remove; `network`, which is `adapted`
    to the call, stays as it is.

    Raises:
        Exception: whatever Torch-Pruning raises, if it cannot analyse the network.
        ValueError: if it finds nothing that can go, or channels that a layer does not have.
    """
    network = _with_all_outputs(network, call)
    names = {parameter: name for name, parameter in network.named_parameters()}
    pruner, graph = _pruner(network, inputs)
    zeros: Zeros = {}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            if not graph.is_out_channel_pruning_fn(dependency.handler):
                continue
            target, node = dependency.target.module, dependency.target
            if isinstance(target, nn.Parameter):
                written = [(target, node.pruning_dim, list(channels))]
            else:
                written = list(_written(target, list(channels)))
            for parameter, axis, places in written:
                if max(places) >= parameter.shape[axis]:
                    raise ValueError(f"Torch-Pruning finds channels that {target} does not have")
                if parameter in names:
                    zeros.setdefault(names[parameter], []).append((axis, places))
    if not zeros:
        raise ValueError("Torch-Pruning finds nothing that it can remove")
    return {**_recurrent(network), **zeros}


def by_layers(network: nn.Module, inputs: Tensor) -> Zeros:
    """Every second output of each layer with weights, with its bias and the norm behind it; not of
    the layers that give the network's outputs."""
    ran, outputs = _run(network, inputs)
    names = {parameter: name for name, parameter in network.named_parameters()}
    layers = [module for module in ran if _has_outputs(module)]
    last = [module for module in layers[-_LAST:] if _width(module) in outputs.shape[1:]]
    zeros = _recurrent(network)
    for module, behind in zip(ran, [*ran[1:], None], strict=True):
        if not _has_outputs(module) or module in last or module is layers[-1]:
            continue
        places = list(range(1, _width(module), 2))
        written = list(_written(module, places))
        if behind is not None and "Norm" in type(behind).__name__:
            written += [
                (parameter, 0, places)
                for parameter in behind.parameters(recurse=False)
                if parameter.shape == (_width(module),)
            ]
        for parameter, axis, each in written:
            if parameter in names:
                zeros.setdefault(names[parameter], []).append((axis, each))
    return zeros


@torch.no_grad()
def zero(network: nn.Module, zeros: Zeros) -> int:
    """Zeroes these in place; returns how many outputs of layers with weights are zero now, and how
    many hidden units of recurrent layers and cells."""
    parameters = dict(network.named_parameters())
    for name, chosen in zeros.items():
        for axis, places in chosen:
            parameters[name].index_fill_(axis, torch.tensor(places, dtype=torch.long), 0.0)
    dead = 0
    for module in network.modules():
        if _has_outputs(module):
            dead += _dead(module.weight, _axis(module))
        elif isinstance(module, _WITH_CELLS):
            for name, weight in module.named_parameters(recurse=False):
                if name.startswith("weight_ih"):
                    of_units = weight.unflatten(0, (-1, module.hidden_size))
                    dead += _dead(of_units.transpose(0, 1), 0)
    return dead


def pruned_alone(network: nn.Module, call: Call, inputs: Tensor) -> nn.Module:
    """What Torch-Pruning makes of a copy of the network, in which the same channels go.

    Raises:
        Exception: whatever Torch-Pruning raises.
    """
    made = _with_all_outputs(network, call)
    pruner, _ = _pruner(made, inputs)
    pruner.step()
    for module in made.modules():
        _tell_heads(module)
    return _adapted_anew(made, call)


def _with_all_outputs(network: nn.Module, call: Call) -> nn.Module:
    """A copy of a network, adapted to the call, that returns all that it did before: what it
    returns beside the output that counts also reads its channels."""
    return _adapted_anew(copied(network), Call(call.names))


def _adapted_anew(network: nn.Module, call: Call) -> nn.Module:
    if type(network).__module__ == adapted.__module__:
        network.__class__ = type(network).__bases__[0]
    return adapted(network, call)


def _pruner(
    network: nn.Module, inputs: Tensor
) -> tuple[torch_pruning.BasePruner, torch_pruning.DependencyGraph]:
    """A pruner of half of each group but of those that the outputs belong to, and its graph."""
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    names = {module: name for name, module in network.named_modules()}
    pruner = torch_pruning.pruner.BasePruner(
        network,
        inputs,
        importance=_Drawn(names),
        pruning_ratio=SHARE,
        num_heads=_heads(network),
        in_channel_groups={},
        out_channel_groups={},
        forward_fn=_forward,
    )
    graph = pruner.DG
    for group in graph.get_all_groups(root_module_types=pruner.root_module_types):
        if any(
            not dependency.target.outputs and graph.is_out_channel_pruning_fn(dependency.handler)
            for dependency, _ in group
        ):
            pruner.ignored_layers.append(group[0][0].target.module)
    return pruner, graph


def _forward(network: nn.Module, inputs: Tensor) -> Tensor:
    made: Tensor = network(inputs)
    return made


class _Drawn:
    """Importances that are drawn by the name of a group's first layer, so that the same go in each
    copy of a network."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names

    def __call__(self, group: torch_pruning.Group) -> Tensor:
        """A number for each channel of the first layer."""
        dependency, channels = group[0]
        name = self.names.get(dependency.target.module, "")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.rand(len(channels), generator=generator)


def _written(module: nn.Module, places: list[int]) -> Iterator[tuple[nn.Parameter, int, list[int]]]:
    """Which of a module's parameters make these of its outputs: along which axis, and where."""
    if isinstance(module, nn.Embedding):
        yield module.weight, 1, places
    elif isinstance(module, nn.MultiheadAttention):
        yield from _written(module.out_proj, places)
        for name in ("in_proj_weight", "in_proj_bias"):
            parameter = getattr(module, name)
            if parameter is not None:
                yield parameter, 0, [p + n * module.embed_dim for n in range(3) for p in places]
    elif isinstance(module, _RECURRENT):
        for name, parameter in module.named_parameters(recurse=False):
            if "_l0" in name:
                yield parameter, 0, _in_gates(parameter, module.hidden_size, places)
    elif not isinstance(module, nn.PReLU):
        for name, parameter in module.named_parameters(recurse=False):
            by_weight = name == "weight" or parameter.shape[-1] == 1
            yield parameter, _axis(module) if by_weight else -1, places
        if is_parametrized(module, "weight"):  # the length of each row, or its direction
            axis = _axis(module)
            made_of = list(module.parametrizations.weight.parameters())
            fits = [each for each in made_of if each.shape[axis] == _width(module)]
            yield from ((each, axis, places) for each in fits[:1])


def _has_outputs(module: nn.Module) -> bool:
    return isinstance(module, _WEIGHTS) or type(module).__name__ == _TURNED


def _axis(module: nn.Module) -> int:
    """Which axis of a module's weight its outputs are."""
    if isinstance(module, _TRANSPOSED) or type(module).__name__ == _TURNED:
        return 1
    return -1 if "Norm" in type(module).__name__ else 0


def _in_gates(parameter: Tensor, hidden: int, places: Sequence[int]) -> list[int]:
    return [n * hidden + place for n in range(len(parameter) // hidden) for place in places]


def _recurrent(network: nn.Module) -> Zeros:
    """Every second hidden unit of recurrent layers: all of their gates."""
    zeros: Zeros = {}
    for prefix, module in network.named_modules():
        if isinstance(module, _WITH_CELLS):
            places = list(range(1, module.hidden_size, 2))
            for name, parameter in module.named_parameters(recurse=False):
                gates = _in_gates(parameter, module.hidden_size, places)
                zeros[f"{prefix}.{name}".lstrip(".")] = [(0, gates)]
    return zeros


def _width(module: nn.Module) -> int:
    """How many outputs a layer has."""
    if type(module).__name__ == _TURNED:
        return module.nf
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _dead(weight: Tensor, axis: int) -> int:
    """How many of the entries along an axis are all zero."""
    return int((weight.movedim(axis, 0).flatten(1) == 0).all(1).sum())


def _run(network: nn.Module, inputs: Tensor) -> tuple[list[nn.Module], Tensor]:
    """The modules without others in them, and norms, which can have an activation in them, in the
    order in which they run, each once, and the outputs."""
    ran: dict[nn.Module, None] = {}

    def note(module: nn.Module, *_: object) -> None:
        ran.setdefault(module)

    leaves = [
        module
        for module in network.modules()
        if _has_outputs(module) or not list(module.children()) or "Norm" in type(module).__name__
    ]
    hooks = [module.register_forward_pre_hook(note) for module in leaves]
    with torch.no_grad():
        outputs: Tensor = network(inputs)
    for hook in hooks:
        hook.remove()
    return list(ran), outputs


def _first(module: nn.Module, names: Sequence[str], kind: type | Callable[..., object]) -> object:
    found = (getattr(module, name, None) for name in names)
    return next((each for each in found if isinstance(each, kind)), None)


def _heads(network: nn.Module) -> dict[nn.Module, int]:
    """How many heads layers of queries, keys and values have, as users of Torch-Pruning say it."""
    heads: dict[nn.Module, int] = {}
    for module in network.modules():
        count = _first(module, _HEADS, int)
        if not isinstance(count, int) or isinstance(module, nn.MultiheadAttention):
            continue
        fewer = _first(module, _KEY_VALUE_HEADS, int) or count
        for names, number in ((_QUERIES, count), (_KEYS_VALUES, fewer)):
            layers = (getattr(module, name, None) for name in names)
            heads |= {layer: number for layer in layers if isinstance(layer, nn.Linear)}
    return heads


def _tell_heads(module: nn.Module) -> None:
    """Corrects what an attention module knows of the width of its heads, and torchvision's
    transformers of their own, as users must."""
    if hasattr(module, "conv_proj") and hasattr(module, "hidden_dim"):
        module.hidden_dim = module.conv_proj.out_channels
    count, queries = _first(module, _HEADS, int), _first(module, _QUERIES, nn.Linear)
    if not isinstance(count, int) or not isinstance(queries, nn.Linear):
        return
    width = queries.out_features // (3 if getattr(module, "qkv", None) is queries else 1)
    sizes = {"head_dim": width // count, "attention_head_size": width // count}
    sizes |= {"all_head_size": width, "attn_dim": width, "dim": width, "inner_dim": width}
    for name, size in sizes.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, size)
