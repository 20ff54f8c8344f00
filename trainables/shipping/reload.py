"""Runs a shipped file in a process of its own: python reload.py FORMAT FILE INPUTS.npy OUTPUTS.npy.

Nothing of slimfront is imported unless the format needs it, so that what is checked is what a user
of the file has.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 1024
"""So many inputs are run at once."""

Batch = dict[str, Any]
"""Arrays (N, …) by the name of the input; one that has no name is alone."""
Run = Callable[[Batch], Any]
"""Makes the outputs (N, …) of a batch."""


def main(kind: str, path: str, inputs: str, outputs: str) -> None:
    """Loads the file, runs it on the inputs (N, *input_shape), and writes its outputs.

    Several inputs are in an archive, by their names.
    """
    loaded = np.load(inputs)
    everything = {"": loaded}
    if inputs.endswith(".npz"):
        everything = dict(loaded)
    first = next(iter(everything.values()))
    count = len(first)
    run = _run_onnx(path) if kind == "onnx" else _run_torch(kind, path)
    made = []
    for start in range(0, count, BATCH):
        end = start + BATCH
        batch = {}
        for name, array in everything.items():
            batch[name] = array[start:end]
        of_batch = run(batch)
        made.append(of_batch)
    together = np.concatenate(made)
    np.save(outputs, together)


def _run_onnx(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(batch: Batch) -> Any:
        fed = {}
        for name in names:
            given = "" if "" in batch else name
            fed[name] = batch[given]
        outputs = session.run(None, fed)
        return outputs[0]

    return run


def _run_torch(kind: str, path: str) -> Run:
    import torch

    if kind == "pt2":
        program = torch.export.load(path)
        network: torch.nn.Module = program.module()
    else:
        from pathlib import Path

        from slimfront.trainables.shipping.formats import load

        network = load(Path(path))

    def run(batch: Batch) -> Any:
        tensors = {}
        for name, array in batch.items():
            tensors[name] = torch.from_numpy(array)
        by_place = all(name.isdigit() or not name for name in tensors)
        with torch.no_grad():
            outputs = network(*tensors.values()) if by_place else network(**tensors)
        return outputs.numpy()

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
