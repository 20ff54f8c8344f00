"""Post-training quantisation to int8 by ONNX Runtime: weights by channel, activations by their
range on training inputs."""

import logging
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.inputs import tensors
from slimfront.trainables.measures.own import OwnMeasure
from slimfront.trainables.shipping.formats import (
    OnnxNetwork,
    need_onnx,
    onnx_names,
    save,
)
from slimfront.trainables.shipping.shipped import Shipped, shipped

_BATCH = 64
_CALIBRATION = 512
"""Ranges of activations are taken on so many training inputs."""


@dataclass(frozen=True)
class Int8:
    """A network after quantisation, in ONNX Runtime; it takes raw inputs."""

    network: OnnxNetwork
    file: bytes

    def sizes(self) -> dict[str, float]:
        """The sizes of its file, by the names of measures."""
        size = float(len(self.file))
        return {
            "bytes": size,
            "bytes_sparse": size,
            "bytes_compressed": float(len(zlib.compress(self.file))),
        }

    def measure(self, own: OwnMeasure) -> float:
        """A measure of the user's, of its file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            path.write_bytes(self.file)
            return own.take(str(path))

    def scores(self, data: Dataset, split: Literal["val", "test"]) -> dict[str, float]:
        """The metrics on the validation or the test split, such as `val_f1`."""
        examples = data.validation if split == "val" else data.test
        return data.task.evaluate_shipped(
            self.network, *examples, split, prepare=lambda inputs: data.raw(inputs).cpu()
        )


def as_int8(network: nn.Module, data: Dataset, threads: int = 1) -> Int8:
    """A compact network that was quantised after training; `network` is left as it is.

    Raises:
        UserError: if the network cannot be exported, or what ONNX needs is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        write_int8(shipped(network, data), data, path)
        return Int8(OnnxNetwork(path, threads), path.read_bytes())


def write_int8(network: Shipped, data: Dataset, path: Path) -> None:
    """Writes the network to an ONNX file with int8 weights and activations; ranges come from the
    first training inputs."""
    need_onnx()
    inputs = data.raw(data.train.inputs[:_CALIBRATION]).cpu()
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder, "exact.onnx")
        save(network, inputs, exact, "onnx")
        quantise(exact, path, inputs)


def quantise(source: Path, target: Path, inputs: Tensor) -> None:
    """Writes the ONNX network at `source` to `target` with int8 weights and activations (QDQ
    operators).

    Jacob et al. 2018, arXiv 1712.05877: q = round(x / scale) + zero point. A weight has one scale
    per output channel; the range of an activation is its minimum and maximum on `inputs`.

    Args:
        inputs: (N, *input_shape) raw training inputs.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            names = onnx_names(inputs)
            self.batches: Iterator[dict[str, Any]] = iter(
                [
                    dict(zip(names, (t.numpy() for t in tensors(part).values()), strict=True))
                    for part in inputs.split(_BATCH)
                ]
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

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
