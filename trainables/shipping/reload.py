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
    """Loads the file, runs it on the inputs (N, *input_shape), and writes its logits (N,
    classes)."""
    everything = np.load(inputs)
    run = _runner(kind, path)
    np.save(
        outputs,
        np.concatenate(
            [run(everything[start : start + BATCH]) for start in range(0, len(everything), BATCH)]
        ),
    )


def _runner(kind: str, path: str) -> Callable[[Any], Any]:
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]
    import torch

    if kind == "pt2":
        network: torch.nn.Module = torch.export.load(path).module()
    else:
        from pathlib import Path

        from slimfront.trainables.shipping.formats import load

        network = load(Path(path))

    def run(batch: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(batch)).numpy()

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
