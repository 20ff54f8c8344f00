"""Weights that a network starts from: read from a file as data, never as code."""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_few, first_line
from slimfront.trainables.options import suggest

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_WITHIN = ("state_dict", "model_state_dict", "model")
"""Where checkpoints of training loops keep the network's state beside other things."""
_COUNT = "num_batches_tracked"
"""How many batches a batch norm has seen."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.")
"""What DistributedDataParallel, torch.compile and modules around a network put before names."""


def load_weights(network: nn.Module, path: str, *, strict: bool = True) -> None:
    """Gives the network the weights of a state dict in a file.

    Args:
        path: of a `.safetensors` file, or of one that `torch.save` wrote: a state dict, or a
            checkpoint that has one as `state_dict`, `model_state_dict` or `model`. Names may begin
            with `module.` or the like, as wrappers of networks write them.
        strict: whether all names must be in both, with the same shapes; what does not fit is left
            out and named otherwise.

    Raises:
        UserError: if the file cannot be read, or names or shapes do not fit; they are named.
    """
    wanted = network.state_dict()
    given = _fitting(read_weights(path), wanted)
    if not strict:
        given = _of_one_shape(given, wanted)
    # Versions of torch before 0.4.1 did not count, and torch takes their files.
    counts = {name for name in wanted.keys() - given.keys() if name.endswith(_COUNT)}
    given |= {name: wanted[name] for name in counts}
    _check(given, wanted, path, strict=strict)
    trained = dict(network.named_parameters(remove_duplicate=False))
    _check_finite({name: value for name, value in given.items() if name in trained}, path)
    network.load_state_dict(given, strict=False)
    left = wanted.keys() - given.keys()
    if left:
        log.warning("model.weights: %s are not in %s, and are as built", _names(sorted(left)), path)


def _check_finite(given: Mapping[str, Tensor], path: str) -> None:
    """Raises UserError for parameters that are no numbers; buffers, such as masks, may be
    infinite."""
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"model.weights: '{name}' in {path} has values that are NaN or infinite, so that "
                "the training that it is of has diverged; take an earlier checkpoint"
            )


State = dict[str, Tensor]
"""A state dict."""


def read_weights(path: str) -> State:
    """The tensors of such a file by name, on the CPU.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    if path.startswith("models:/"):
        raise UserError(
            f"model.weights: {path} is of MLflow's model registry, which a search asks; here, give "
            "the file of a state dict"
        )
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"model.weights: {path} ends in none of {', '.join(SUFFIXES)}; give the file of a "
            "state dict"
        )
    if not file.is_file():
        raise UserError(
            f"model.weights: there is no file {path}; relative paths count from {Path.cwd()}"
        )
    try:
        if file.suffix == ".safetensors":
            found = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file makes readers raise, it is no state dict
        raise UserError(
            f"model.weights: {path} cannot be read as tensors and plain data "
            f"({type(error).__name__}: {first_line(error)}); save the state dict alone: "
            "torch.save(network.state_dict(), path)"
        ) from None
    state = _state_within(found)
    if not state:
        has = ""
        if isinstance(found, Mapping) and found:
            has = f": it has {_names(map(str, found))}, and none of {_names(_WITHIN)}"
        raise UserError(
            f"model.weights: {path} holds no state dict, a mapping of names to tensors{has}; save "
            "one by torch.save(network.state_dict(), path)"
        )
    return state


def _state_within(found: Any) -> State | None:
    """The state dict in what was loaded."""
    if not isinstance(found, Mapping):
        return None
    for key in _WITHIN:
        inner = found.get(key)
        if isinstance(inner, Mapping):
            return _state_within(inner)
    tensors = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(name, str):
            return None
        tensors[name] = value
    return tensors or None


def _fitting(given: State, wanted: Mapping[str, Tensor]) -> State:
    """`given` without the names of wrappers, as many of them as make most of it fit."""
    best = given
    state = given
    most = _count_common(given, wanted)
    while True:
        wrapper = _wrapper_of(state)
        if wrapper is None:
            return best
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
        common = _count_common(state, wanted)
        if common > most:
            best = state
            most = common


def _wrapper_of(names: Collection[str]) -> str | None:
    """What a wrapper put before all names; None if it is not the same for all, or there are
    none."""
    if not names:
        return None
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in names):
            return wrapper
    return None


def _count_common(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    common = one.keys() & other.keys()
    return len(common)


def _of_one_shape(given: State, wanted: Mapping[str, Tensor]) -> State:
    """`given` without what has another shape in the network, such as the head of another task."""
    found = {}
    for name, tensor in given.items():
        if name not in wanted or tensor.shape == wanted[name].shape:
            found[name] = tensor
    return found


def _check(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str, *, strict: bool
) -> None:
    for name, tensor in given.items():
        if name not in wanted:
            continue
        shape = tuple(tensor.shape)
        in_network = tuple(wanted[name].shape)
        if shape != in_network:
            raise UserError(
                f"model.weights: '{name}' has the shape {shape} in {path}, and "
                f"{in_network} in the network; build the network that was trained, or set "
                "model.strict: false to take what fits"
            )
    if not _count_common(given, wanted):
        raise UserError(
            f"model.weights: no name in {path} is one of the network's: it has {_names(given)}, "
            f"and the network {_names(wanted)}"
        )
    if strict:
        _check_all_there("no", wanted, given, path)
        _check_all_there("an unknown", given, wanted, path)


def _check_all_there(kind: str, names: Iterable[str], known: Iterable[str], path: str) -> None:
    """Raises UserError if a name is not among those that are known; `kind` says what it is in the
    file then."""
    others = sorted(set(names) - set(known))
    if not others:
        return
    first = others[0]
    more = f", and {len(others) - 1} more such" if len(others) > 1 else ""
    raise UserError(
        f"model.weights: {path} has {kind} '{first}'{more}; set model.strict: false to take "
        f"what fits; {suggest(first, known)}"
    )


def _names(state: Iterable[str]) -> str:
    return first_few([f"'{name}'" for name in state], 3)
