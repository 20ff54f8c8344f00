"""Times of the exported file: in ONNX Runtime, in OpenVINO, and by a command. No test here depends
on how fast this machine is."""

import ast
import os
import select
import shlex
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.trainables.data import Dataset, Digits
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.measures.latency import SPEEDS, Latency, Timing
from slimfront.trainables.shipping import stopwatch
from slimfront.trainables.shipping.formats import OnnxNetwork
from slimfront.trainables.shipping.stopwatch import Stopwatch, time_by_command

SIZE = """
import sys
from pathlib import Path
print("warming up")
print(Path(sys.argv[1]).stat().st_size / 1000)
"""
"""A command that takes a thousand bytes for a millisecond."""


def by_python(folder: Path, program: str, **options: Any) -> Latency:
    """Times by a program in Python."""
    file = folder / "time it.py"  # with a space
    file.write_text(program)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(file))} {{file}}"
    return Latency(command=command, runs=3, warm_up=0, **options)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Digits().load()


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).eval()


@pytest.fixture
def inputs(data: Dataset) -> Tensor:
    return data.prepare(data.validation.inputs[:4])


def test_onnx_runtime_runs_the_files_of_both_networks_on_raw_inputs(
    data: Dataset, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def timed(networks: list[OnnxNetwork], raw: Tensor, options: Latency) -> list[Timing]:
        outputs = [one(raw) for one in networks]
        seen.extend([networks, raw, outputs])
        return [Timing((6.0,), (1.0,)), Timing((2.0,), (3.0,))]

    monkeypatch.setattr(stopwatch, "time_networks", timed)
    dense, small = network(64), network(8)
    watch = Stopwatch(data, Latency(runtime="onnx", threads=2, batch_size=5), dense)
    assert watch.measure(small, inputs, SPEEDS) == {"latency_ms": 2.0, "speedup": 3.0}
    networks, raw, outputs = seen
    assert all(type(one) is OnnxNetwork for one in networks)
    assert all(one.session.get_session_options().intra_op_num_threads == 2 for one in networks)
    wanted = data.validation.inputs[:5]
    assert torch.equal(raw, data.raw(wanted))
    for made, own in zip(outputs, (dense, small), strict=True):
        assert torch.allclose(made, own(data.prepare(wanted)), atol=1e-5)


def test_times_in_onnx_runtime_are_taken_and_a_network_is_as_fast_as_itself(
    data: Dataset, inputs: Tensor
) -> None:
    watch = Stopwatch(data, Latency(runtime="onnx", runs=3, warm_up=0))
    found = watch.measure(network(8), inputs, [*SPEEDS, "bytes_compressed"])
    assert set(found) == {*SPEEDS, "bytes_compressed"}
    assert found["latency_ms"] > 0
    assert found["speedup"] > 0


def test_only_what_is_asked_for_is_exported(
    data: Dataset, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise AssertionError("there is nothing to time")

    monkeypatch.setattr(stopwatch, "write_onnx", refuses)
    watch = Stopwatch(data, Latency(runtime="onnx"), network(64))
    assert set(watch.measure(network(8), inputs, ["bytes_compressed"])) == {"bytes_compressed"}
    assert watch.measure(network(8), inputs, []) == {}


def test_a_command_is_given_the_file_of_both_networks(
    tmp_path: Path, data: Dataset, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    exported = []
    real = stopwatch.write_onnx

    def write(one: nn.Module, given: Dataset, path: Path) -> None:
        real(one, given, path)
        exported.append(path.stat().st_size)

    monkeypatch.setattr(stopwatch, "write_onnx", write)
    watch = Stopwatch(data, by_python(tmp_path, SIZE), network(64))
    found = watch.measure(network(8), inputs, SPEEDS)
    small, dense = exported
    assert found == pytest.approx({"latency_ms": small / 1000, "speedup": dense / small})
    watch.measure(network(16), inputs, SPEEDS)
    assert len(exported) == 3  # the dense network is exported once
    assert Stopwatch(data, by_python(tmp_path, SIZE)).measure(network(8), inputs, SPEEDS) == {
        "latency_ms": pytest.approx(small / 1000, rel=0.01),
        "speedup": 1.0,
    }


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import sys; sys.exit('no device')", "ended with exit code 1; .*stderr: no device$"),
        ("print('12 ms')", "printed '12 ms' last, and must print milliseconds"),
        ("print('1.5'); print('done')", "printed 'done' last"),
        ("print('nan')", "printed 'nan' last"),
        ("print(0)", "printed '0' last, and must print milliseconds, a number above 0"),
        ("print(-3)", "printed '-3' last"),
        ("", "printed nothing last, .*; it printed nothing on stderr$"),
        ("import sys; print('a\\nb', file=sys.stderr)", "its last line on stderr: b$"),
        ("import os; os.kill(os.getpid(), 9)", "ended with exit code -9"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_sentence_that_names_it(
    tmp_path: Path, program: str, problem: str
) -> None:
    latency = by_python(tmp_path, program)
    with pytest.raises(TrialFailure, match=problem) as caught:
        time_by_command(latency, tmp_path / "n.onnx")
    assert str(caught.value).startswith("latency.command '")
    assert "time it.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_command_that_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    latency = Latency(command="./no_such_program {file}")
    with pytest.raises(TrialFailure, match=r"cannot be started \(No such file or directory\)"):
        time_by_command(latency, tmp_path / "n.onnx")


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    program = f"""
import os, subprocess, sys, time
writer = os.open({str(held)!r}, os.O_WRONLY)
os.write(writer, b"x")
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleeps, pass_fds=[writer])
print("waiting for the device", file=sys.stderr, flush=True)
time.sleep(600)
"""
    latency = by_python(tmp_path, program, timeout=4)
    with pytest.raises(TrialFailure, match=r"within latency\.timeout, 4 s; .*: waiting for the d"):
        time_by_command(latency, tmp_path / "n.onnx")
    assert os.read(reader, 1) == b"x"
    # The end comes when nobody can write any more: both are gone.
    assert select.select([reader], [], [], 30)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    made = tmp_path / "made"
    heard = tmp_path / "heard"
    told = tmp_path / "told.py"
    told.write_text(f"import sys; open({str(heard)!r}, 'w').write(repr(sys.argv[1:])); print(7)")
    shell = f"{sys.executable} {told} {{file}} $(touch {made}) `touch {made}` ; touch {made} | cat"
    file = tmp_path / "a $(touch b).onnx"
    assert time_by_command(Latency(command=shell), file) == 7
    assert not made.exists()
    words = ["$(touch", f"{made})", "`touch", f"{made}`", ";", "touch", str(made), "|", "cat"]
    assert ast.literal_eval(heard.read_text()) == [str(file), *words]


class FakeOpenVino(types.ModuleType):
    """OpenVINO's public API as `OpenVinoNetwork` calls it, which computes by ONNX Runtime."""

    def __init__(self) -> None:
        super().__init__("openvino")
        self.__spec__ = ModuleSpec("openvino", None)
        self.settings: list[dict[str, Any]] = []

    def Core(self) -> "FakeOpenVino":
        return self

    def compile_model(self, path: str, device: str, settings: dict[str, Any]) -> Any:
        assert device == "CPU"
        self.settings.append(settings)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        ports = [types.SimpleNamespace(names={one.name}) for one in session.get_inputs()]

        class Compiled:
            inputs = ports

            def __call__(self, fed: dict[str, Any]) -> Any:
                return dict(enumerate(session.run(None, fed)))

        return Compiled()


def test_openvino_is_refused_in_one_sentence_where_it_is_not_installed(
    data: Dataset, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    watch = Stopwatch(data, Latency(runtime="openvino"))
    with pytest.raises(UserError, match="needs the package openvino, which is not installed"):
        watch.measure(network(8), inputs, ["latency_ms"])


def test_openvino_runs_the_file_with_the_threads_that_are_asked_for(
    data: Dataset, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = FakeOpenVino()
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    latency = Latency(runtime="openvino", threads=2, runs=3, warm_up=0)
    found = Stopwatch(data, latency, network(64)).measure(network(8), inputs, SPEEDS)
    assert found["latency_ms"] > 0
    assert [one["INFERENCE_NUM_THREADS"] for one in openvino.settings] == [2, 2]


def candidate(latency: Latency, **changes: Any) -> Candidate:
    return Candidate.model_validate(
        {
            "model": {"name": "mlp", "depth": 1, "width": 32},
            "training": {"epochs": 1, "seed": 0},
            "one_shot": {"steps": 1},
            "measures": list(SPEEDS),
            "latency": latency.model_dump(),
            **changes,
        }
    )


@pytest.mark.slow
def test_every_network_of_a_candidate_is_timed_as_its_file_int8_too(tmp_path: Path) -> None:
    latency = by_python(tmp_path, SIZE)
    plain = train(candidate(latency))
    int8 = train(candidate(latency, int8=True))
    assert plain.pruned
    for found in (plain, *plain.pruned, int8):
        assert found.measures["latency_ms"] > 0
    dense_ms = plain.measures["latency_ms"] * plain.measures["speedup"]
    assert int8.measures["latency_ms"] * int8.measures["speedup"] == pytest.approx(dense_ms)
    assert int8.measures["latency_ms"] == int8.measures["bytes"] / 1000


def test_a_command_that_fails_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network cannot be timed: latency") as caught:
        train(candidate(by_python(tmp_path, "print('fast')")))
    assert "printed 'fast' last" in str(caught.value)
