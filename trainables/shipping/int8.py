"""Post-training quantisation to int8 by ONNX Runtime: weights by channel, activations by their range on training inputs."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

_BATCH = 64


def quantise(source: Path, target: Path, inputs: Tensor) -> None:
    """Writes the ONNX network at `source` to `target` with int8 weights and activations (QDQ operators).

    Jacob et al. 2018, arXiv 1712.05877: q = round(x / scale) + zero point. A weight has one scale per output channel; the range
    of an activation is its minimum and maximum on `inputs`.

    Args:
        inputs: (N, *input_shape) raw training inputs.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([part.numpy() for part in inputs.split(_BATCH)])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on pre-processing, which was done
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder, "prepared.onnx")
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                Batches(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        root.setLevel(level)
