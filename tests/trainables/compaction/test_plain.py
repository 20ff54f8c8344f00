import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.compaction import deserialise, serialise
from slimfront.trainables.models.resnet import BasicBlock


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 3),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Identity(),
        nn.Linear(3, 2, bias=False),
    ).eval()


def test_a_stored_network_loads_with_weights_only_in_another_process(tmp_path: Path) -> None:
    model = network()
    inputs = torch.randn(5, 4)
    torch.save(serialise(fx.symbolic_trace(model)), tmp_path / "network.pt")
    torch.save({"inputs": inputs, "outputs": model(inputs)}, tmp_path / "expected.pt")
    program = f"""
import torch
from pathlib import Path
from slimfront.trainables.compaction import deserialise
folder = Path({str(tmp_path)!r})
network = deserialise(torch.load(folder / "network.pt", weights_only=True))
expected = torch.load(folder / "expected.pt", weights_only=True)
assert torch.equal(network(expected["inputs"]), expected["outputs"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_kind_of_module_is_named() -> None:
    with pytest.raises(ValueError, match="cannot store a Tanhshrink"):
        serialise(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Tanhshrink())))


def test_an_unknown_operation_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.pinv(x)

    with pytest.raises(ValueError, match="cannot store the operation 'linalg_pinv'"):
        serialise(fx.symbolic_trace(Odd()))


def test_a_network_with_branches_and_nested_modules_comes_back_bit_identical() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), BasicBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(deserialise(serialise(fx.symbolic_trace(model)))(inputs), model(inputs))


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="stored in format 99, and this version reads format"):
        deserialise({"format": 99})


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.pad(x, (1, 1, 0, 2)),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: torch.cat([x, torch.stack([x, x], 1).sum(1)], 1),
        lambda x: torch.split(x, 2, 1)[0] * x.split([2, 2], dim=1)[1],
        lambda x: torch.chunk(x, 2, dim=1)[1] / 3 - x.chunk(2, 1)[0],
        lambda x: torch.einsum("nchw,nchv->nwv", x, x),
        lambda x: F.silu(x).softmax(1) + F.log_softmax(x, dim=-1) @ torch.sigmoid(x),
        lambda x: F.pixel_shuffle(F.leaky_relu(x, 0.2), 2).clamp(min=0),
        lambda x: x.repeat(1, 2, 1, 1).unflatten(1, (2, -1)).amax(1).roll(1, 2) ** 2,
        lambda x: F.normalize(F.max_pool1d(x.flatten(2), 2), dim=1),
    ],
)
def test_common_operations_come_back_bit_identical(operation: Callable[[Tensor], Tensor]) -> None:
    class Does(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operation(x)

    inputs = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    restored = deserialise(serialise(fx.symbolic_trace(Does())))
    assert torch.equal(restored(inputs), operation(inputs))
