"""What a teacher makes of the training inputs, once per node.

An entry is named by all that decides its content: the weights, the inputs, and what the network
makes of a few of them now. So a network whose code has changed gets another one.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimfront.trainables.data.cache.entries import (
    cache_folder,
    code_version,
    locked,
    make_room,
    warn_once,
)
from slimfront.trainables.data.tensor_file import TensorFile, read_tensors
from slimfront.trainables.inputs import tensors as tensors_of

Made = Callable[[Tensor], Tensor]
"""What a network makes of inputs, (N, …) to (N, …)."""

WORTHWHILE = 5.0
"""Seconds that the outputs of all inputs must take: what is quicker is not kept."""

_PROBED = 256
_NAME = "outputs"


def outputs_once(network: nn.Module, inputs: Tensor, made: Made) -> Tensor:
    """What `made` gives for all inputs (N, …), on their device: of this node's cache, where another
    process of it has asked for the same.

    Args:
        network: whose weights count; `made` is by this network.
    """
    started = time.perf_counter()
    of_few = made(inputs[:_PROBED])
    probe = of_few.cpu()  # waits for a GPU
    seconds = time.perf_counter() - started
    if seconds * len(inputs) < WORTHWHILE * len(probe):
        return made(inputs)
    try:
        entry = cache_folder() / _key(network, inputs, probe)
        with locked(entry.with_suffix(".lock")):
            kept = _read(entry.with_suffix(".data"))
            if kept is not None:
                return kept.to(inputs.device)
            outputs = made(inputs)
            _keep(entry, outputs)
            return outputs
    except OSError as error:
        _complain(error)
    return made(inputs)


def _key(network: nn.Module, inputs: Tensor, probe: Tensor) -> str:
    digest = hashlib.sha256(code_version().encode())
    parts = {**network.state_dict(), **tensors_of(inputs), "probe": probe}
    for name, tensor in parts.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:32]


def _read(entry: Path) -> Tensor | None:
    """What is kept there; None if there is nothing, or it is damaged."""
    if not entry.exists():
        return None
    os.utime(entry)  # what was used last is thrown away last
    found = read_tensors(entry)
    if found is None:
        return None
    tensors, _ = found
    return tensors[_NAME]


def _keep(entry: Path, outputs: Tensor) -> None:
    """Writes an entry; a warning where that is not possible."""
    try:
        make_room(entry.parent, outputs.nbytes)
        _write(entry.with_suffix(".part"), outputs)
    except OSError as error:
        _complain(error)


def _write(part: Path, outputs: Tensor) -> None:
    file = TensorFile(part)
    try:
        file.finish({_NAME: outputs}, {})
        part.replace(part.with_suffix(".data"))
    finally:
        file.close()
        part.unlink(missing_ok=True)


def _complain(error: OSError) -> None:
    warn_once(
        f"what the teacher makes of the data cannot be put into the cache on disk: {error}. Each "
        "process computes it for itself"
    )
