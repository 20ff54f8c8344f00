"""The formats that a network ships in: `torch.export` (pt2), ONNX, and safetensors."""

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction import deserialise, serialise
from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import UserError, first_few, first_line
from slimfront.trainables.inputs import Several, by_place, described, joined, tensors
from slimfront.trainables.shipping.kernels import Kernel, has_2_of_4, with_sparse_kernels
from slimfront.trainables.shipping.shipped import (
    CONSTANTS,
    ByArguments,
    Shipped,
    as_called,
    shipped,
)
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.other_sizes import varying_axes
from slimfront.trainables.torch_internals import flattened

log = logging.getLogger(__name__)

Format = Literal["pt2", "onnx", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
_OUTPUT = "output"
_PLACES = re.compile(rf"{_OUTPUT}_\d+")
_LOUD = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".safetensors": "safetensors"}
_GRAPH = "slimfront.graph"


def save(
    network: Shipped,
    inputs: Tensor,
    path: Path,
    kind: Format,
    *,
    sparse_kernels: Sequence[Kernel] = (),
) -> None:
    """Writes a network in evaluation mode, for batches of any size, and of sequences of any length
    as far as the network takes them.

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
        return
    few = inputs[:2]
    if kind == "pt2":
        _save_pt2(network, few, path)
    else:
        _save_onnx(network, few, path)


def write_onnx(network: nn.Module, data: Dataset, path: Path) -> None:
    """Writes a network that takes what `data.prepare` makes to an ONNX file, as it ships; `network`
    stays as it is, on its device.

    Raises:
        UserError: if the format cannot hold this network, or what it needs is not installed.
    """
    few = data.validation.inputs[:2]
    raw = data.raw(few.cpu())
    here = copied(network).cpu()
    whole = shipped(here, data)
    save(whole, raw, path, "onnx")


def format_of(path: Path) -> Format:
    """The format that the suffix of a file says. Raises UserError if it says none."""
    kind = _SUFFIXES.get(path.suffix)
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise UserError(f"{path}: the suffix says no format; known: {known}")
    return kind


def load(path: Path | str, device: str = "cpu") -> nn.Module:
    """A network that was written by `save`, by the suffix of its file; it takes raw inputs (N,
    *input_shape).

    Args:
        device: where the network and its inputs are to be, such as "cuda"; files that are not
            safetensors are for "cpu".

    Raises:
        UserError: if there is no such file, its suffix is none of ours, or it cannot be read.
    """
    path = Path(path)
    kind = format_of(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if device != "cpu" and kind != "safetensors":
        raise UserError(
            f"{path} cannot be loaded on {device!r}: only safetensors files can, {kind} files load "
            "on 'cpu'"
        )
    try:
        with _quietly():
            if kind != "safetensors":
                return _READERS[kind](path)
            network, names, kernels = _load_safetensors(path)
            ready = _with_kernels(network, kernels, device)
            if names == [""]:
                return ready
            called = ByArguments(ready, names)
            return called.eval()
    except UserError:
        raise
    except Exception as error:  # every format raises its own kinds
        said = first_line(error)
        raise UserError(f"{path} cannot be read as {kind}: {said}") from None


def _save_pt2(network: Shipped, inputs: Tensor, path: Path) -> None:
    with _quietly():
        _for_any_length(network, inputs, lambda program: torch.export.save(program, path))


def why_not_exported(network: nn.Module, inputs: Tensor) -> str | None:
    """Why torch.export does not take a network, which pt2 and ONNX begin with; None if it does.

    Args:
        inputs: (N, *input_shape), what the network sees.
    """
    if len(inputs) < 2:
        inputs = joined(inputs, inputs)
    alone = Shipped(network, None, None).eval()
    with _quietly(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        logging.disable()  # torch.export logs the whole graph that it gave up on
        try:
            _exported(alone, inputs[:2])
        except UserError as error:
            return str(error)
        finally:
            logging.disable(logging.NOTSET)
    return None


def _exported(
    network: Shipped, inputs: Tensor, *, any_length: bool = False
) -> torch.export.ExportedProgram:
    """The program of a network for any number of inputs; with `any_length`, of sequences of any
    length."""
    batch = torch.export.Dim("batch", min=1)
    sizes: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors(inputs).items():
        sizes[name] = {0: batch}
        if any_length:
            sizes[name].update(dict.fromkeys(varying_axes(tensor), torch.export.Dim.AUTO))
    called = as_called(network, inputs)
    export = torch.export.export
    try:
        if not isinstance(inputs, Several):
            return export(called, (inputs,), dynamic_shapes=(sizes[""],))
        if by_place(list(inputs.named)):
            values = tuple(inputs.named.values())
            return export(called, values, dynamic_shapes=tuple(sizes.values()))
        return export(called, (), kwargs=inputs.named, dynamic_shapes=sizes)
    except Exception as error:  # torch raises many kinds
        reason = first_line(error)
        raise UserError(f"torch.export does not take this network: {reason}") from None


def _for_any_length(
    network: Shipped, inputs: Tensor, write: Callable[[torch.export.ExportedProgram], None]
) -> None:
    """Writes the program of a network for sequences of any length, or, where that cannot be, for
    those of the inputs' length."""
    if any(varying_axes(tensor) for tensor in tensors(inputs).values()):
        try:
            write(_exported(network, inputs, any_length=True))
        except UserError as error:
            log.warning("the file takes sequences of one length alone: %s", error)
        else:
            return
    write(_exported(network, inputs))


def _load_pt2(path: Path) -> nn.Module:
    program = torch.export.load(path)
    return program.module()


def _save_onnx(network: Shipped, inputs: Tensor, path: Path) -> None:
    need_onnx()
    with torch.no_grad():
        outputs = _names_of(network(inputs.clone()), onnx_names(inputs))

    def write(program: torch.export.ExportedProgram) -> None:
        try:
            torch.onnx.export(
                program,
                (),
                str(path),
                dynamo=True,
                input_names=onnx_names(inputs),
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch raises many kinds
            reason = first_line(_deepest(error))
            raise UserError(f"torch.onnx does not take this network: {reason}") from None

    with _quietly():
        _for_any_length(network, inputs, write)


def _names_of(outputs: object, taken: Collection[str]) -> list[str]:
    """What the outputs of an ONNX file are called: by their keys, or by their places."""
    if isinstance(outputs, Tensor):
        return [_OUTPUT]
    leaves, _ = flattened(outputs)
    parts = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if isinstance(outputs, Mapping) and len(parts) == len(outputs):
        names = [str(name) for name in outputs]
        if set(names).isdisjoint(taken) and not all(map(_PLACES.fullmatch, names)):
            return names
    return [f"{_OUTPUT}_{place}" for place in range(len(parts))]


def _as_named(names: Sequence[str], outputs: Sequence[Tensor]) -> Any:
    """The outputs of an ONNX file, as `_names_of` calls them: one, several by their keys, or by
    their places."""
    if list(names) == [_OUTPUT]:
        return outputs[0]
    if _OUTPUT in names or all(map(_PLACES.fullmatch, names)):
        return tuple(outputs)
    return dict(zip(names, outputs, strict=True))


def _deepest(error: BaseException) -> BaseException:
    """What an error goes back to: those of torch.onnx begin with what its steps are."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def onnx_names(inputs: Tensor) -> list[str]:
    """What the inputs of an ONNX file are called."""
    if not isinstance(inputs, Several):
        return ["input"]
    names = list(inputs.named)
    if not by_place(names):
        return names
    return [f"input_{name}" for name in names]


def need_onnx() -> None:
    """Raises UserError if what ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        needed = ", ".join(missing)
        raise UserError(
            f"the format onnx needs {needed}; install it by: pip install 'slimfront[onnx]'"
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

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Raw inputs (N, *input_shape) to outputs (N, …); several inputs by their places or names,
        as the file has them, or together as `Several`; several outputs as a tuple, or by their
        names."""
        known = [one.name for one in self.session.get_inputs()]
        if len(inputs) == 1 and not named:
            fed = fed_to(known, inputs[0])
        else:
            placed = dict(zip(known, inputs, strict=False))
            given = placed | named
            if len(inputs) + len(named) != len(known) or given.keys() != set(known):
                raise TypeError(f"the inputs of this file are {first_few(known)}")
            fed = {name: tensor.numpy() for name, tensor in given.items()}
        outputs = map(torch.from_numpy, self.session.run(None, fed))
        names = [one.name for one in self.session.get_outputs()]
        return _as_named(names, list(outputs))


def fed_to(known: Collection[str], inputs: Tensor) -> dict[str, Any]:
    """Arrays by the names of an ONNX file's inputs, of those that it still has."""
    names = onnx_names(inputs)
    values = tensors(inputs).values()
    fed = {}
    for name, tensor in zip(names, values, strict=True):
        if name in known:
            fed[name] = tensor.numpy()
    return fed


def _save_safetensors(
    network: Shipped, inputs: Tensor, path: Path, *, sparse_kernels: Sequence[Kernel]
) -> None:
    if not isinstance(network.network, GraphModule):
        raise UserError(
            "the format safetensors holds networks that were compacted, and this one was not"
        )
    plain = serialise(network.network)
    stored = {}
    for name in CONSTANTS:
        constant = getattr(network, name)
        if constant is not None:
            stored[name] = constant
    for name, module in plain["modules"].items():
        state = module.pop("state")
        for key, tensor in state.items():
            stored[f"{name}/{key}"] = tensor.contiguous()
    description = {
        "inputs": list(tensors(inputs)),
        "takes": described(inputs),
        "sparse_kernels": list(sparse_kernels),
        "names": list(network.names),
        **plain,
    }
    text = json.dumps(description)
    safetensors.torch.save_file(stored, path, metadata={_GRAPH: text})


class _Read(NamedTuple):
    """What a safetensors file has: the network on the CPU, the names of its inputs, and the sparse
    kernels that the file asks for."""

    network: Shipped
    inputs: list[str]
    kernels: list[Kernel]


def _load_safetensors(path: Path) -> _Read:
    stored = {}
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            stored[name] = file.get_tensor(name)
    description = metadata.get(_GRAPH)
    if description is None:
        raise UserError(f"{path} has no description of a network: it was not written by slimfront")
    plain = json.loads(description)
    modules = plain["modules"]
    for module in modules.values():
        module["state"] = {}
    for name, tensor in stored.items():
        module_name, slash, key = name.rpartition("/")
        if slash:
            module = modules[module_name]
            module["state"][key] = tensor
    network = deserialise(plain)
    mean, std, scale, offset = map(stored.get, CONSTANTS)
    names = tuple(plain.get("names", ()))
    whole = Shipped(network, mean, std, scale, offset, names)
    inputs = plain.get("inputs", [""])
    return _Read(whole.eval(), inputs, plain["sparse_kernels"])


def _with_kernels(network: nn.Module, kernels: Sequence[Kernel], device: str) -> nn.Module:
    """The network on its device, with those sparse kernels of the file that the device has."""
    network = network.to(device)
    on_gpu = torch.device(device).type == "cuda"
    kernel: Kernel | None = None
    if "2:4" in kernels and on_gpu:
        if has_2_of_4():
            kernel = "2:4"
    elif "CSR" in kernels and device == "cpu":
        kernel = "CSR"
    if kernel is None:
        return network
    return with_sparse_kernels(network, kernel) or network


_READERS: dict[Format, Callable[[Path], nn.Module]] = {"pt2": _load_pt2, "onnx": OnnxNetwork}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps exporters from talking: torch's one for ONNX warns of torchvision, which is not
    needed, and says what it leaves as it is."""
    loud = [logging.getLogger(name) for name in _LOUD]
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
