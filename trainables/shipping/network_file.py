"""How a finished network is kept: as a graph of plain data where it was compacted, else as the
state of the model it is."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction import Compaction
from slimfront.trainables.compaction.compact import relative_difference
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.plain import FORMAT, deserialise, serialise
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.inputs import Call
from slimfront.trainables.models import Model, adapted
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.tasks.evaluating import evaluating

_DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)
"""What is raised for a file that is not as `torch.save` left it."""


def network_file(step: int = 0) -> str:
    """The file in a checkpoint that holds the compact network, after so many steps of one-shot
    pruning."""
    return f"network-{step}.pt" if step else "network.pt"


def store(
    network: nn.Module,
    model: Model,
    input_shape: tuple[int, ...],
    outputs: int,
    call: Call | None = None,
) -> dict[str, Any]:
    """Plain data and tensors, loadable with `weights_only=True`, that `restore` turns into the
    network again.

    A network that is not a traced graph must be one that `model` builds.
    """
    if isinstance(network, GraphModule):
        return serialise(network)
    state = _state(network)
    built = {
        "options": _options(model),
        "input_shape": list(input_shape),
        "outputs": outputs,
        "call": (call or Call()).as_plain(),
    }
    return {"format": FORMAT, "model": built, "state": state}


def _options(model: Model) -> dict[str, Any]:
    """What decides how a network is built; what it starts from does not."""
    return model.model_dump(mode="json", exclude={"weights", "strict"})


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's parameters and buffers on the CPU; what has several names is one
    tensor, and so is stored once."""
    copies: dict[int, Tensor] = {}
    return {
        name: copies.setdefault(id(tensor), tensor.detach().cpu().clone())
        for name, tensor in network.state_dict(keep_vars=True).items()
    }


def restore(stored: dict[str, Any], model: Model | None = None) -> nn.Module:
    """The network that `store` kept, in evaluation mode on the CPU, with bit-identical weights.

    Nothing that `stored` names is imported or called: where it is the state of a model, `model`
    builds it.

    Args:
        stored: what `store` gave.
        model: the model by the config that the network was trained with; not needed for networks
            that were compacted.

    Raises:
        ValueError: if it is damaged, of another format, or of another model.
    """
    if "model" not in stored:
        return deserialise(stored)
    built = stored["model"]
    if model is None:
        raise ValueError(
            "it holds weights alone, and the config that says how its network is built is not there"
        )
    if built["options"] != _options(model):
        raise ValueError("it is a network of another model than the config has")
    outputs = built.get("outputs", built.get("classes"))  # the latter in files of version 0.1
    network = model.build(tuple(built["input_shape"]), outputs)
    network = adapted(network, Call.of(built.get("call")))
    network.load_state_dict(stored["state"])
    return network.eval()


def read(file: Path | None, model: Model | None = None) -> nn.Module:
    """The network in a file of a checkpoint, as `restore` gives it; None is a file that was
    deleted.

    Raises:
        UserError: why it cannot be read.
    """
    if file is None:
        raise UserError("its file was deleted")
    try:
        return restore(load_tensors(file), model)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # of data of another form
        reason = first_line(error)
        raise UserError(f"{file} is damaged, or was not written by slimfront: {reason}") from None


def load_tensors(file: Path) -> dict[str, Any]:
    """The tensors and plain data in a file that `torch.save` wrote, on the CPU; nothing else is
    made of it.

    Raises:
        UserError: if it is not there, or is not as it was written: the file has a checksum of each
            of its parts.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(
                f"{file} is damaged: its part {damaged} is not as it was written; restore it from "
                "a copy"
            )
        loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except _DAMAGE as error:
        reason = first_line(error)
        raise UserError(f"{file} is damaged, or was not written by slimfront: {reason}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file} was not written by slimfront: it holds a {type(loaded).__name__}")
    return loaded


def check_storable(network: nn.Module, sample: Tensor) -> None:
    """Finds out before training if a network can be compacted and kept; `sample` (N, *input_shape)
    are real inputs.

    Raises:
        UserError: if it cannot be traced, or does not come back from plain data as it was;
            compaction must be off then.
    """
    with evaluating(network):
        try:
            _store_and_restore(network, sample)
        except (UserError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the network cannot be compacted: {error}; {_way_out(network, sample)}"
            ) from None


def _store_and_restore(network: nn.Module, sample: Tensor) -> None:
    traced = traced_in_both_modes(network, sample[:3])
    split_attention(traced)
    restored = deserialise(serialise(traced))
    with torch.no_grad():
        same = torch.equal(restored(sample), traced(sample))
    tolerance = Compaction().tolerance
    if not same or not relative_difference(network, traced, sample, tolerance) <= tolerance:
        raise ValueError("its stored form does not compute the same")


def _way_out(network: nn.Module, sample: Tensor) -> str:
    """What to do with a network that cannot be compacted: to train it as it is leads nowhere if
    nothing can ship it then."""
    # Imported late: this is the only need for it.
    from slimfront.trainables.shipping.formats import (
        why_not_exported,
    )

    reason = why_not_exported(network, sample)
    if reason is None:
        return "set compaction.enabled: false to train it as it is"
    return f"without compaction no format could ship it ({reason}), so its forward must change"
