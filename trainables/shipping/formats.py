"""The formats that a network ships in: `torch.export` (pt2), ONNX, and safetensors."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from slimfront.trainables.compaction import deserialise, serialise
from slimfront.trainables.errors import UserError
from slimfront.trainables.shipping.kernels import Kernel, has_2_of_4, with_sparse_kernels

Format = Literal["pt2", "onnx", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".safetensors": "safetensors"}
_GRAPH = "slimfront.graph"


class Shipped(nn.Module):
    """A network that takes inputs as they come: normalisation, (x − mean) / std, is its first
    step."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (N, *input_shape), uint8 or float32, to logits (N, classes)."""
        logits: Tensor = self.network((inputs.float() - self.mean) / self.std)
        return logits


def save(
    network: Shipped,
    inputs: Tensor,
    path: Path,
    kind: Format,
    *,
    sparse_kernels: Sequence[Kernel] = (),
) -> None:
    """Writes a network in evaluation mode, for batches of any size.

    `pt2` needs torch to be loaded, `onnx` any ONNX runtime, `safetensors` slimfront.

    Args:
        inputs: (N, *input_shape), N ≥ 2, raw inputs of the type that the file is to take.
        sparse_kernels: those that `load` is to give the linear layers that suit them; for
            safetensors.

    Raises:
        UserError: if the format cannot hold this network, or what it needs is not installed.
    """
    network = network.eval()
    if kind == "safetensors":
        _save_safetensors(network, inputs, path, sparse_kernels=sparse_kernels)
    else:
        {"pt2": _save_pt2, "onnx": _save_onnx}[kind](network, inputs[:2], path)


def load(path: Path, device: str = "cpu") -> nn.Module:
    """A network that was written by `save`, by the suffix of its file; it takes raw inputs (N,
    *input_shape).

    Args:
        device: where the network and its inputs are to be, such as "cuda"; files that are not
            safetensors are for "cpu".

    Raises:
        UserError: if there is no such file, its suffix is none of ours, or it cannot be read.
    """
    kind = _SUFFIXES.get(path.suffix)
    if kind is None:
        raise UserError(f"{path}: the suffix says no format; known: {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if device != "cpu" and kind != "safetensors":
        raise UserError(
            f"{path} cannot be loaded on {device!r}: only safetensors files can, {kind} files load "
            "on 'cpu'"
        )
    try:
        with _quietly():
            return (
                _with_kernels(*_load_safetensors(path), device)
                if kind == "safetensors"
                else _READERS[kind](path)
            )
    except UserError:
        raise
    except Exception as error:  # every format raises its own kinds
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as {kind}: {said}") from None


def _save_pt2(network: Shipped, inputs: Tensor, path: Path) -> None:
    with _quietly():
        torch.export.save(_exported(network, inputs), path)


def why_not_exported(network: nn.Module, inputs: Tensor) -> str | None:
    """Why torch.export does not take a network, which pt2 and ONNX begin with; None if it does.

    Args:
        inputs: (N, *input_shape), what the network sees.
    """
    inputs = torch.cat([inputs, inputs]) if len(inputs) < 2 else inputs
    with _quietly(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        logging.disable()  # torch.export logs the whole graph that it gave up on
        try:
            _exported(
                Shipped(network, inputs.new_tensor(0.0), inputs.new_tensor(1.0)).eval(), inputs[:2]
            )
        except UserError as error:
            return str(error)
        finally:
            logging.disable(logging.NOTSET)
    return None


def _exported(network: Shipped, inputs: Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(
            network, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
    except Exception as error:  # torch raises many kinds
        raise UserError(
            f"torch.export does not take this network: {str(error).splitlines()[0]}"
        ) from None


def _load_pt2(path: Path) -> nn.Module:
    return torch.export.load(path).module()


def _save_onnx(network: Shipped, inputs: Tensor, path: Path) -> None:
    need_onnx()
    with _quietly():
        torch.onnx.export(
            _exported(network, inputs),
            (),
            str(path),
            dynamo=True,
            input_names=["input"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )


def need_onnx() -> None:
    """Raises UserError if what ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the format onnx needs {', '.join(missing)}; install it by: pip install "
            "'slimfront[onnx]'"
        )


class OnnxNetwork(nn.Module):
    """An ONNX file in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """`threads` 0: as many as ONNX Runtime likes."""
        need_onnx()
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (N, *input_shape) to logits (N, classes)."""
        return torch.from_numpy(self.session.run(None, {self.input: inputs.numpy()})[0])


def _save_safetensors(
    network: Shipped, inputs: Tensor, path: Path, *, sparse_kernels: Sequence[Kernel]
) -> None:
    if not isinstance(network.network, fx.GraphModule):
        raise UserError(
            "the format safetensors holds networks that were compacted; this one was trained with "
            "compaction off"
        )
    plain = serialise(network.network)
    tensors = {"mean": network.mean, "std": network.std}
    for name, module in plain["modules"].items():
        tensors |= {
            f"{name}/{key}": tensor.contiguous() for key, tensor in module.pop("state").items()
        }
    dtype = str(inputs.dtype).removeprefix("torch.")
    description = {
        "dtype": dtype,
        "input_shape": list(inputs.shape[1:]),
        "sparse_kernels": list(sparse_kernels),
        **plain,
    }
    safetensors.torch.save_file(tensors, path, metadata={_GRAPH: json.dumps(description)})


def _load_safetensors(path: Path) -> tuple[Shipped, list[Kernel]]:
    """The network on the CPU, and the sparse kernels that the file asks for."""
    with safetensors.safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(_GRAPH)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if described is None:
        raise UserError(f"{path} has no description of a network: it was not written by slimfront")
    plain: dict[str, Any] = json.loads(described)
    for module in plain["modules"].values():
        module["state"] = {}
    for name, tensor in tensors.items():
        module, slash, key = name.rpartition("/")
        if slash:
            plain["modules"][module]["state"][key] = tensor
    network: nn.Module = deserialise(plain)
    return Shipped(network, tensors["mean"], tensors["std"]).eval(), plain["sparse_kernels"]


def _with_kernels(network: nn.Module, kernels: Sequence[Kernel], device: str) -> nn.Module:
    """The network on its device, with those sparse kernels of the file that the device has."""
    network = network.to(device)
    if "2:4" in kernels and torch.device(device).type == "cuda" and has_2_of_4():
        return with_sparse_kernels(network, "2:4") or network
    if "CSR" in kernels and device == "cpu":
        return with_sparse_kernels(network, "CSR") or network
    return network


_READERS: dict[Format, Callable[[Path], nn.Module]] = {"pt2": _load_pt2, "onnx": OnnxNetwork}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps exporters from talking: torch's one for ONNX warns of torchvision, which is not
    needed."""
    loud = logging.getLogger("torch.onnx"), logging.getLogger("torch.export")
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
