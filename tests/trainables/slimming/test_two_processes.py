"""Slimming in a loop with DistributedDataParallel, on two real processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODULE = "tests.trainables.slimming.two_processes"


def run(size: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights that each process ends with."""
    result = folder / f"of-{size}"
    commands = [
        [sys.executable, "-m", MODULE, str(rank), str(size), f"file://{folder}/meet", str(result)]
        for rank in range(size)
    ]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=100) for process in processes] == [0] * size
    return [torch.load(f"{result}.{rank}", weights_only=True) for rank in range(size)]


@pytest.mark.slow
def test_two_processes_end_with_the_network_of_one(tmp_path: Path) -> None:
    first, second = run(2, tmp_path)
    (alone,) = run(1, tmp_path)
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-8)
    assert sum(int((weight == 0).sum()) for weight in alone.values()) > 300
