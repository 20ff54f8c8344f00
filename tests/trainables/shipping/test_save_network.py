"""`slimfront.save_network` and `load_network`: what a loop of one's own made, as files."""

import logging
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


class Heads(nn.Module):
    """Two outputs, in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body, self.label, self.box = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        label, box = self.label(x), self.box(x)
        if self.form == "tuple":
            return label, box
        if self.form == "nested":
            return {"all": [label, box]}
        if self.form == "one":
            return {"label": label}
        return {"label": label, "box": box}


@pytest.mark.parametrize("form", ["tuple", "mapping", "nested", "one"])
@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_all_outputs_are_in_the_file(form: str, suffix: str, tmp_path: Path) -> None:
    network = Heads(form).eval()
    inputs = torch.randn(8, 6)
    small = sf.compact(network, inputs)
    path = tmp_path / f"heads.{suffix}"
    sf.save_network(small, path, inputs)
    found, wanted = sf.load_network(path)(inputs[:5]), network(inputs[:5])
    if form == "nested" and suffix == "onnx":  # an ONNX file has a list of outputs
        found = {"all": list(found)}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_may_be_parts_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the tokens of a text but for the last one."""
    network = nn.Sequential(nn.Embedding(20, 8), nn.ReLU(), nn.Linear(8, 20)).eval()
    tokens = torch.randint(0, 20, (8, 17))
    path = tmp_path / "words.onnx"
    sf.save_network(sf.compact(network, tokens[:, :-1]), path, tokens[:, :-1])
    longer = torch.randint(0, 20, (3, 23))
    torch.testing.assert_close(sf.load_network(path)(longer), network(longer))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""
