import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from trainables.compaction import to_plain


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Identity(), nn.Linear(3, 2, bias=False)
    ).eval()


def test_a_stored_network_loads_with_weights_only_in_another_process(tmp_path: Path) -> None:
    model = network()
    inputs = torch.randn(5, 4)
    torch.save(to_plain(fx.symbolic_trace(model)), tmp_path / "network.pt")
    torch.save({"inputs": inputs, "outputs": model(inputs)}, tmp_path / "expected.pt")
    program = f"""
import torch
from pathlib import Path
from trainables.compaction import from_plain
folder = Path({str(tmp_path)!r})
network = from_plain(torch.load(folder / "network.pt", weights_only=True))
expected = torch.load(folder / "expected.pt", weights_only=True)
assert torch.equal(network(expected["inputs"]), expected["outputs"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_an_unknown_kind_of_module_is_named() -> None:
    with pytest.raises(ValueError, match="cannot store a Tanh"):
        to_plain(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Tanh())))


def test_a_network_that_is_not_a_sequence_is_refused() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x

    with pytest.raises(ValueError, match="not a sequence of modules"):
        to_plain(fx.symbolic_trace(Skip()))
