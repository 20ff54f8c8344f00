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


def main(kind: str, path: str, inputs: str, outputs: str) -> None:
    """Loads the file, runs it on the inputs (N, *input_shape), and writes its outputs.

    Several inputs are in an archive, by their names.
    """
    loaded = np.load(inputs)
    everything = dict(loaded) if inputs.endswith(".npz") else {"": loaded}
    count = len(next(iter(everything.values())))
    run = _runner(kind, path)
    made = []
    for start in range(0, count, BATCH):
        made.append(run({name: all_[start : start + BATCH] for name, all_ in everything.items()}))
    np.save(outputs, np.concatenate(made))


def _runner(kind: str, path: str) -> Callable[[dict[str, Any]], Any]:
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run_onnx(batch: dict[str, Any]) -> Any:
            fed = {names[0]: batch[""]} if "" in batch else {name: batch[name] for name in names}
            return session.run(None, fed)[0]

        return run_onnx
    import torch

    if kind == "pt2":
        network: torch.nn.Module = torch.export.load(path).module()
    else:
        from pathlib import Path

        from slimfront.trainables.shipping.formats import load

        network = load(Path(path))

    def run(batch: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.no_grad():
            if all(name.isdigit() or not name for name in tensors):
                return network(*tensors.values()).numpy()
            return network(**tensors).numpy()

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
