"""Parts of a network that training leaves as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.options import suggest


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters out of training, by name, where `*` stands for any characters.

    Raises:
        UserError: if a pattern names none, or nothing is left to train.
    """
    check_names(network, "training.freeze", patterns)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if frozen(name, patterns):
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            "training.freeze: it names all parameters of the network, and none is left to train; "
            "set training.epochs: 0 to prune the network as it is"
        )


def check_names(network: nn.Module, key: str, patterns: Sequence[str]) -> None:
    """Raises UserError if one of the patterns that `key` of the config has is the name of no
    parameter."""
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{key}: no parameter of the network is called '{pattern}'; "
                f"{suggest(pattern, names)}"
            )


def frozen_names(network: nn.Module) -> tuple[str, ...]:
    """The parameters that require no gradient, by all of their names."""
    named = network.named_parameters(remove_duplicate=False)
    return tuple(name for name, parameter in named if not parameter.requires_grad)


def frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of that name stays as it is."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def training_mode(network: nn.Module, patterns: Sequence[str]) -> None:
    """Training mode, but for norms whose parameters are all frozen: their statistics stay too."""
    network.train()
    if not patterns:
        return
    for prefix, module in network.named_modules():
        own = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        if hasattr(module, "running_mean") and own and all(frozen(n, patterns) for n in own):
            module.eval()
