"""The node's cache: a data set is decoded by one process of a node and mapped into memory by all.

An entry is one file (`tensor_file.py`), named by all that decides its content. The first process
that needs it writes it under a file lock, with another name, and renames it; the others wait for
the lock. The kernel releases the lock of a process that dies.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.data.base import CLASSIFICATION, Data, Dataset, Split, attach, nbytes
from slimfront.trainables.data.cache.entries import (
    FOLDER,
    cache_folder,
    code_version,
    locked,
    make_room,
    warn_once,
)
from slimfront.trainables.data.tensor_file import TensorFile, in_process, read_tensors
from slimfront.trainables.data.transforms import Augment
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several
from slimfront.trainables.inputs import tensors as tensors_of
from slimfront.trainables.tasks import Task

_SPLITS = ("train", "validation", "test")
log = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def load_once(options: Data, device: torch.device, task: Task | None = None) -> Dataset:
    """The data set of these options for networks on `device`, with its task: decoded at most once
    per node, else once per process.

    Args:
        task: classification if None.
    """
    task = task or CLASSIFICATION
    without_augment = options.model_copy(update={"augment": Augment()})
    plain = _load_plain(without_augment, device, task)
    if options.augment.active:
        return replace(plain, augment=options.augment)
    return plain


@lru_cache(maxsize=4)
def _load_plain(options: Data, device: torch.device, task: Task) -> Dataset:
    """Kept apart from augmentation, so that a search over it shares one set of tensors."""
    resolved = task.resolve()
    loaded = load_shared(options, resolved).to(device)
    if loaded.attached is not None:
        return loaded
    return attach(loaded, resolved)


def load_shared(options: Data, task: Task = CLASSIFICATION) -> Dataset:
    """The data set of these options, on the CPU: from the node's cache, which is filled first if
    need be.

    Where the cache cannot be written, the data set is loaded into this process, with a warning.

    Raises:
        UserError: as `Data.load` does; or if the data has to be on disk (`in_memory: false`) and
            cannot be written there.
    """
    if options.in_memory is True:
        return options.load(task)
    fingerprint = options.fingerprint()
    if fingerprint is None and options.in_memory == "auto":
        return options.load(task)
    try:
        folder = cache_folder()
        entry = folder / _key(options, task, fingerprint)
        with locked(entry.with_suffix(".lock")):
            data = _read(entry.with_suffix(".data"))
            if data is None:
                part = entry.with_suffix(".part")
                data = _fill(options, task, part, keep=fingerprint is not None)
    except OSError as error:
        _complain(options, error)
        return options.load(task)
    is_large = 2 * _size(data) > memory_bytes()
    streamed = options.in_memory is False or is_large
    return replace(data, streamed=streamed)


def files_state(files: Iterable[Path]) -> str:
    """Names, sizes and modification times of files: what changes when they do."""
    states = []
    for file in sorted(files):
        state = file.stat()
        states.append((str(file), state.st_size, state.st_mtime_ns))
    text = json.dumps(states)
    return hashlib.sha256(text.encode()).hexdigest()


def memory_bytes() -> int:
    """The memory of this machine, or of its container if that has less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(name)
        if not file.is_file():
            continue
        limit = file.read_text().strip()
        if limit.isdigit():
            found = min(found, int(limit))
    return found


def _size(data: Dataset) -> int:
    return sum(nbytes(getattr(data, name)) for name in _SPLITS)


def _key(options: Data, task: Task, fingerprint: str | None) -> str:
    """The name of the entry: of all that decides the content."""
    content: list[Any] = [
        code_version(),
        options.model_dump(mode="json", exclude={"augment", "in_memory"}),
        task.model_dump(mode="json"),
        os.getpid() if fingerprint is None else fingerprint,
    ]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(entry: Path) -> Dataset | None:
    """The data set of an entry; None if it is not there or damaged."""
    try:
        found = read_tensors(entry)
        os.utime(entry)  # what was used last is thrown away last
    except FileNotFoundError:
        return None
    if found is None:
        log.warning("%s in the cache is damaged: the data set is decoded again", entry)
        return None
    tensors, extra = found
    splits = []
    for name in _SPLITS:
        inputs = _inputs_in(tensors, name, extra["inputs"])
        splits.append(Split(inputs, tensors[f"{name}.targets"]))
    train, validation, test = splits
    standardised_by = None
    if "standardised_by.mean" in tensors:
        standardised_by = (tensors["standardised_by.mean"], tensors["standardised_by.std"])
    return Dataset(
        train,
        validation,
        test,
        outputs=extra["outputs"],
        mean=tensors.get("mean"),
        std=tensors.get("std"),
        standardised_by=standardised_by,
        augment=Augment.model_validate(extra["augment"]),
        names=tuple(extra["names"]),
        normalised=extra["normalised"],
    )


def _inputs_in(tensors: dict[str, Tensor], split: str, names: list[str]) -> Tensor:
    """The inputs of a split in an entry: one tensor, or several by name."""
    named = {name: tensors[f"{split}.inputs.{name}"] for name in names}
    if names == [""]:
        return named[""]
    return Several(named)


def _fill(options: Data, task: Task, part: Path, *, keep: bool) -> Dataset:
    """Loads the data set into a file at `part`, and renames it to an entry; one that is not to be
    kept has no name any more."""
    file = TensorFile(part)
    troubles: list[OSError] = []

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.empty(tuple(shape), dtype=dtype, device="meta").nbytes
        try:
            make_room(part.parent, size)
            return file.allocate(shape, dtype)
        except OSError as error:
            troubles.append(error)
            _complain(options, error)
            return in_process(shape, dtype)

    try:
        data = options.load(task, allocate)
        if troubles or type(data) is not Dataset:
            return data
        try:
            file.finish(_tensors_in(data), _extra_in(data))
            written = part
            if keep:
                written = part.replace(part.with_suffix(".data"))
            return _read(written) or data
        except OSError as error:
            _complain(options, error)
            return data
    finally:
        file.close()
        part.unlink(missing_ok=True)
        if not keep:
            part.with_suffix(".lock").unlink(missing_ok=True)


def _tensors_in(data: Dataset) -> dict[str, Tensor]:
    """The tensors of an entry by name."""
    tensors: dict[str, Tensor] = {}
    for split in _SPLITS:
        inputs, targets = getattr(data, split)
        for name, tensor in tensors_of(inputs).items():
            tensors[f"{split}.inputs.{name}"] = tensor
        tensors[f"{split}.targets"] = targets
    mean, std = data.standardised_by or (None, None)
    constants = {
        "mean": data.mean,
        "std": data.std,
        "standardised_by.mean": mean,
        "standardised_by.std": std,
    }
    for name, constant in constants.items():
        if constant is not None:
            tensors[name] = constant
    return tensors


def _extra_in(data: Dataset) -> dict[str, Any]:
    """What else an entry holds, as plain data."""
    return {
        "outputs": data.outputs,
        "inputs": list(tensors_of(data.train.inputs)),
        "names": list(data.names),
        "normalised": data.normalised,
        "augment": data.augment.model_dump(),
    }


def _complain(options: Data, error: OSError) -> None:
    """Says why the cache is not used; that is an error where the data has to be on disk."""
    reason = (
        f"the data set '{options.name}' cannot be put into the cache on disk: "
        f"{error}; set {FOLDER} to a folder with room"
    )
    if options.in_memory is False:
        raise UserError(f"{reason}, or leave out 'in_memory: false'") from None
    warn_once(f"{reason}. Each process loads it for itself")
