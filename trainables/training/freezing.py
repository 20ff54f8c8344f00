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
    trained = [parameter.requires_grad for parameter in network.parameters()]
    if patterns and not any(trained):
        raise UserError(
            "training.freeze: it names all parameters of the network, and none is left to train; "
            "leave it out, with training.epochs: 0 to prune the network as it is"
        )


def check_names(network: nn.Module, key: str, patterns: Sequence[str]) -> None:
    """Raises UserError if one of the patterns that `key` of the config has is the name of no
    parameter."""
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        matches = [fnmatchcase(name, pattern) for name in names]
        if any(matches):
            continue
        hint = suggest(pattern, names)
        raise UserError(f"{key}: no parameter of the network is called '{pattern}'; {hint}")


def frozen_names(network: nn.Module) -> tuple[str, ...]:
    """The parameters that require no gradient, by all of their names."""
    names = []
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            names.append(name)
    return tuple(names)


def frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of that name stays as it is."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def training_mode(network: nn.Module, patterns: Sequence[str]) -> None:
    """Training mode, but for norms whose parameters are all frozen: their statistics stay too."""
    network.train()
    if not patterns:
        return
    for prefix, module in network.named_modules():
        if not hasattr(module, "running_mean"):
            continue
        stays = []
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}".lstrip(".")
            stays.append(frozen(full_name, patterns))
        if stays and all(stays):
            module.eval()
