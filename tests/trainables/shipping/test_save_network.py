"""`slimfront.save_network` and `load_network`: what a loop of one's own made, as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        made: Tensor = self.last(self.left(left).relu() - self.right(right).relu())
        return made


def inputs_of(network: nn.Module, count: int) -> Any:
    if isinstance(network, Two):
        return torch.randn(count, 6), torch.randn(count, 4)
    return torch.randn(count, 6)


@pytest.mark.parametrize(
    ("suffix", "compact"),
    [
        *(("onnx", True), ("pt2", True), ("safetensors", True)),
        *(("onnx", False), ("pt2", False)),
    ],
)
@pytest.mark.parametrize("kind", ["one input", "two inputs"])
def test_a_file_gives_the_same_network(
    kind: str, suffix: str, compact: bool, tmp_path: Path
) -> None:
    network: nn.Module = Two()
    if kind == "one input":
        network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network.eval()
    inputs = inputs_of(network, 8)
    made: Any = sf.compact(network, inputs) if compact else network
    path = tmp_path / f"small.{suffix}"
    sf.save_network(made, path, inputs)
    again = sf.load_network(path)
    other = inputs_of(network, 5)
    with torch.no_grad():
        wanted = network(*other) if isinstance(other, tuple) else network(other)
        got = again(*other) if isinstance(other, tuple) else again(other)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_suffix_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.UserError, match=r"the suffix says no format; known: .*\.onnx"):
        sf.save_network(nn.Linear(6, 3), tmp_path / "small.bin", torch.randn(4, 6))
