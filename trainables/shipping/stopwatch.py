"""Times of networks where they ship: of the exported file in a runtime, or by a command of the
user's."""

import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import TrialFailure, UserError, first_line_of, shorten
from slimfront.trainables.measures.latency import FILE, SPEEDS, Latency, time_networks
from slimfront.trainables.measures.measure import measure_extra
from slimfront.trainables.shipping.formats import (
    OnnxNetwork,
    fed_to,
    need_onnx,
    write_onnx,
)

_TIMEOUT_S = 60.0
"""A command may take so long where the config does not say."""


Times = dict[str, float]
"""`latency_ms` and `speedup`."""


class Stopwatch:
    """Takes the measures that are asked for of networks of one candidate, times among them as
    `latency` says."""

    def __init__(self, data: Dataset, latency: Latency, dense: nn.Module | None = None) -> None:
        """`dense` is what a speed-up is against, taken in the same way; None: the network
        itself."""
        self.data = data
        self.latency = latency
        self.dense = dense
        self._dense_file: bytes | None = None

    def measure(
        self, network: nn.Module, inputs: Tensor, names: Collection[str]
    ) -> dict[str, float]:
        """Those of `EXTRA_MEASURES` that are in `names` (see `measure_extra`).

        Args:
            inputs: (N, *input_shape), at least one real input, as the network sees it.

        Raises:
            UserError: if the runtime is not installed, or the network cannot be exported.
            TrialFailure: if the command fails, or prints no time.
        """
        if not self.latency.of_file:
            return measure_extra(network, inputs, names, self.dense, self.latency)
        others = [name for name in names if name not in SPEEDS]
        found = measure_extra(network, inputs, others)
        no_times = len(others) == len(names)
        if no_times:
            return found
        need_runtime(self.latency)
        file = self._exported(network)
        times = self.measure_file(file, names)
        return found | times

    def measure_file(self, file: bytes, names: Collection[str]) -> dict[str, float]:
        """The times among `names` of an ONNX file, as `measure`."""
        need_runtime(self.latency)
        with tempfile.TemporaryDirectory(prefix="slimfront-") as folder:
            path = Path(folder, "network.onnx")
            path.write_bytes(file)
            against = None
            if self.dense is not None and "speedup" in names:
                against = Path(folder, "dense.onnx")
                dense_file = self._file_of_dense(self.dense)
                against.write_bytes(dense_file)
            times = self._times(path, against)
        found = {}
        for name in SPEEDS:
            if name in names:
                found[name] = times[name]
        return found

    def _times(self, path: Path, against: Path | None) -> Times:
        if self.latency.command is None:
            return self._in_runtime(path, against)
        return self._by_command(path, against)

    def _in_runtime(self, path: Path, against: Path | None) -> Times:
        size = self.latency.batch_size
        examples = self.data.validation
        stored = examples.inputs[:size]
        inputs = self.data.raw(stored).cpu()
        compared = against or path
        reference = self._loaded(compared)
        network = self._loaded(path)
        _, timing = time_networks([reference, network], inputs, self.latency)
        return {"latency_ms": timing.latency_ms, "speedup": timing.speedup}

    def _loaded(self, path: Path) -> nn.Module:
        if self.latency.runtime == "openvino":
            return OpenVinoNetwork(path, self.latency.threads)
        return OnnxNetwork(path, self.latency.threads)

    def _by_command(self, path: Path, against: Path | None) -> Times:
        before = None
        if against is not None:
            before = time_by_command(self.latency, against)
        taken = time_by_command(self.latency, path)
        speedup = 1.0
        if before is not None:
            speedup = before / taken
        return {"latency_ms": taken, "speedup": speedup}

    def _file_of_dense(self, dense: nn.Module) -> bytes:
        """Written once: what it is compared with are many."""
        if self._dense_file is None:
            self._dense_file = self._exported(dense)
        return self._dense_file

    def _exported(self, network: nn.Module) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            write_onnx(network, self.data, path)
            return path.read_bytes()


class OpenVinoNetwork(nn.Module):
    """An ONNX file in OpenVINO, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        openvino: Any = import_module("openvino")
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self.known: set[str] = set()
        for port in self.compiled.inputs:
            self.known |= set(port.names)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (N, *input_shape) to outputs (N, …)."""
        fed = fed_to(self.known, inputs)
        outputs = self.compiled(fed)
        return torch.from_numpy(outputs[0])


def need_runtime(latency: Latency) -> None:
    """Raises UserError if what takes the times is not installed, or what writes the file."""
    if latency.runtime == "openvino":
        try:
            import_module("openvino")
        except ImportError:
            raise UserError(
                "latency.runtime: openvino needs the package openvino, which is not installed; "
                "install it by: pip install openvino, or set latency.runtime to onnx or torch"
            ) from None
    if latency.of_file:
        need_onnx()


def time_by_command(latency: Latency, path: Path) -> float:
    """The milliseconds that the command prints of the file at `path`.

    Raises:
        TrialFailure: one sentence with the command and the last line of its stderr, if it cannot be
            started, ends with another code than 0, takes too long, or prints no number above 0.
    """
    command = latency.command
    assert command is not None
    timeout = latency.timeout or _TIMEOUT_S
    file = str(path)
    words = [word.replace(FILE, file) for word in shlex.split(command)]
    # Files, and not pipes, which what the command leaves behind could hold open.
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        try:
            code = _run(words, printed, errors, timeout)
        except subprocess.TimeoutExpired:
            problem = f"did not end within latency.timeout, {timeout:g} s"
            raise _failure(command, problem, errors) from None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise _failure(command, f"cannot be started ({why})", errors) from None
        if code:
            raise _failure(command, f"ended with exit code {code}", errors)
        said = _last_line(printed)
        found = _number(said)
        if not math.isfinite(found) or found <= 0:
            shown = "nothing"
            if said:
                short = shorten(said)
                shown = f"'{short}'"
            problem = f"printed {shown} last, and must print milliseconds, a number above 0"
            raise _failure(command, problem, errors)
        return found


def _number(said: str) -> float:
    """The number that a text is; NaN if it is none."""
    try:
        return float(said)
    except ValueError:
        return math.nan


def _run(words: list[str], printed: IO[bytes], errors: IO[bytes], timeout: float) -> int:
    """The exit code of a command, which is ended with all that it started if it takes too long."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=errors,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failure(command: str, problem: str, errors: IO[bytes]) -> TrialFailure:
    last = _last_line(errors)
    heard = "it printed nothing on stderr"
    if last:
        line = first_line_of(last)
        heard = f"its last line on stderr: {shorten(line, 200)}"
    shown = shorten(command, 100)
    return TrialFailure(f"latency.command '{shown}' {problem}; {heard}")


def _last_line(file: IO[bytes]) -> str:
    """The last line that has anything in it; empty if there is none."""
    file.seek(0)
    text = file.read().decode(errors="replace")
    lines = text.strip().splitlines()
    if not lines:
        return ""
    return lines[-1].strip()
