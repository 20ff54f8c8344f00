"""Ships a network: writes the file, checks it in a fresh process on real inputs, measures it, and
writes its card."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several, joined
from slimfront.trainables.measures.latency import Latency, Timing, time_networks
from slimfront.trainables.measures.measure import measure, measure_extra
from slimfront.trainables.shipping import reload
from slimfront.trainables.shipping.formats import Format, OnnxNetwork, onnx_names, save
from slimfront.trainables.shipping.int8 import write_int8
from slimfront.trainables.shipping.kernels import (
    BATCHES,
    Kernel,
    Tried,
    relative_difference,
    try_kernels,
)
from slimfront.trainables.shipping.shipped import Shipped
from slimfront.trainables.shipping.shipped import shipped as as_shipped

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SearchedTimes:
    """The times that a search took of a network, by measure."""

    taken: str
    """How, such as: in ONNX Runtime."""
    during: Mapping[str, float]
    """While other trials ran."""
    again: Mapping[str, float]
    """When it was over; empty where they were not taken."""


@dataclass(frozen=True)
class Shipment:
    """A file that was written and checked."""

    path: Path
    kind: Format
    int8: bool
    difference: float
    """The largest difference of its outputs to the network's, relative to the largest output; seen
    in a fresh process."""
    checked: int
    """On how many inputs."""
    scores: Mapping[str, float]
    """The metrics of the file on the validation and test splits, from the same outputs."""
    trained_scores: Mapping[str, float]
    """Those of the network before it was written."""
    measures: Mapping[str, float]
    """Of the network (see `measure`), and `file_bytes`."""
    dense_measures: Mapping[str, float]
    timings: Mapping[int, tuple[Timing, Timing]]
    """By batch size: of the dense network and of this one, in the same format."""
    tried: Sequence[Tried]
    """What sparse kernels did in torch; empty where the network has no layer that suits them."""
    sparse_kernels: Sequence[Kernel]
    """Those that the file asks for: it is a safetensors file, and they were faster at every batch
    size."""
    searched: SearchedTimes | None = None
    """What the search that it is of measured; None where that took no times, or there was none."""


def ship(
    network: nn.Module,
    dense: nn.Module,
    data: Dataset,
    path: Path,
    kind: Format = "pt2",
    *,
    int8: bool = False,
    latency: Latency | None = None,
) -> Shipment:
    """Writes a network to `path`, and returns what was seen of the file; nothing is left at `path`
    if it is not right.

    Args:
        network: a compact network in evaluation mode on the CPU, which takes what `data.prepare`
            makes.
        dense: the network that it is compared with; its weights do not matter.
        int8: whether to quantise it after training; for ONNX.
        latency: how times are taken, but for the size of the batch.

    Raises:
        UserError: if the file cannot be written, exists already, or does not compute what the
            network computes.
    """
    check_output(path)
    if int8 and kind != "onnx":
        raise UserError(f"int8 networks ship as onnx, and this is to be {kind}")
    shipped = as_shipped(network, data)
    dense_shipped = as_shipped(dense, data)
    held_out = joined(data.validation.inputs, data.test.inputs).cpu()
    raw = data.raw(held_out)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".slimfront-") as folder:
        written = Path(folder, path.name)
        tried = try_kernels(shipped, raw, latency)
        faster = [each.kernel for each in tried if each.faster and kind == "safetensors"]
        if int8:
            write_int8(shipped, data, written)
        else:
            examples = data.raw(data.train.inputs[:2].cpu())
            save(shipped, examples, written, kind, sparse_kernels=faster)
        made = _in_a_fresh_process(written, kind, raw)
        wanted = _outputs(shipped, raw)
        difference = relative_difference(made, wanted)
        if not int8 and not difference <= _TOLERANCE:
            raise UserError(
                f"the {kind} file computes something else: its outputs are off by {difference:.1e} "
                "of their size"
            )
        timings = _time(shipped, dense_shipped, raw, written, kind, latency or Latency())
        measures = _measures(network, data)
        measures["file_bytes"] = written.stat().st_size
        written.replace(path)
    return Shipment(
        path,
        kind,
        int8,
        difference,
        len(raw),
        _scores(made, data),
        _scores(wanted, data),
        measures,
        _measures(dense, data),
        timings,
        tried,
        faster,
    )


def _measures(network: nn.Module, data: Dataset) -> dict[str, float]:
    sample = data.prepare(data.validation.inputs[:8])
    usual = measure(network, sample)
    compressed = measure_extra(network, sample, ["bytes_compressed"])
    return usual | compressed


def check_output(path: Path) -> None:
    """Raises UserError if a file cannot be written there, or is there already."""
    if path.exists():
        raise UserError(f"{path} is there already; choose another name, or take it away first")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder} to write {path.name} to")
    try:
        # Not by what the directory permits: of some file systems that says nothing.
        Path(tempfile.mkdtemp(dir=folder, prefix=".slimfront-")).rmdir()
    except OSError as error:
        said = (error.strerror or "permission denied").lower()
        raise UserError(f"cannot write to {folder}: {said}") from None


def card_beside(output: Path) -> Path:
    """Where the card of a file goes: the same name with .md, or, where another format of the same
    name has its card there, with .md behind the whole name.

    Raises:
        UserError: if the file or its card cannot be written, or is there already.
    """
    check_output(output)
    card = output.with_suffix(".md")
    if card.exists():
        card = output.with_name(f"{output.name}.md")
    check_output(card)
    return card


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    made = [network(batch) for batch in inputs.split(reload.BATCH)]
    return torch.cat(made)


def _in_a_fresh_process(path: Path, kind: Format, inputs: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "outputs.npy")
        if isinstance(inputs, Several):
            seen = Path(folder, "inputs.npz")
            names = onnx_names(inputs) if kind == "onnx" else list(inputs.named)
            arrays = [tensor.numpy() for tensor in inputs.named.values()]
            by_name = dict(zip(names, arrays, strict=True))
            np.savez(seen, **by_name)  # type: ignore[arg-type]
        else:
            seen = Path(folder, "inputs.npy")
            np.save(seen, inputs.numpy())
        error = reload_afresh([kind, str(path), str(seen), str(said)])
        if error is not None:
            lines = error.strip().splitlines()
            why = lines[-1] if lines else "it said nothing"
            raise UserError(f"the {kind} file could not be loaded in a fresh process: {why}")
        return torch.from_numpy(np.load(said))


def reload_afresh(arguments: list[str]) -> str | None:
    """Runs `reload.py` in a new process; what that says on stderr if it fails."""
    # -P: the directory of reload.py is no place to import from.
    command = [sys.executable, "-P", str(reload.__file__), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


def _scores(outputs: Tensor, data: Dataset) -> dict[str, float]:
    """Of what a shipped network made of the validation and then the test inputs, (N, …)."""
    task = data.task
    count = len(data.validation.targets)
    found: dict[str, float] = {}
    for name, of_split, split in (
        ("val", outputs[:count], data.validation),
        ("test", outputs[count:], data.test),
    ):
        state = task.state_of_shipped(of_split, split.targets.cpu())
        found |= task.scores(state.tolist(), name)
    return found


def _time(
    network: Shipped, dense: Shipped, inputs: Tensor, path: Path, kind: Format, latency: Latency
) -> dict[int, tuple[Timing, Timing]]:
    """Both networks in the runtime of the format: ONNX Runtime, or torch."""
    pair: Sequence[nn.Module] = (dense, network)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "onnx":
            reference = Path(folder, "dense.onnx")
            save(dense, inputs, reference, kind)
            threads = latency.threads
            pair = (OnnxNetwork(reference, threads), OnnxNetwork(path, threads))
        found = {}
        for batch_size in BATCHES:
            of_size = latency.model_copy(update={"batch_size": batch_size})
            one, other = time_networks(pair, inputs, of_size)
            found[batch_size] = (one, other)
        return found
