"""Sparse kernels: the same outputs, only in layers that suit them, and only where they were
measured to be faster."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.latency import Latency, Timing
from slimfront.trainables.shipping import kernels
from slimfront.trainables.shipping.formats import Shipped, load, save
from slimfront.trainables.shipping.kernels import (
    HalfLinear,
    SemiStructuredLinear,
    has_2_of_4,
    is_2_of_4,
    try_kernels,
    with_sparse_kernels,
)
from slimfront.trainables.sparsifiers.nm import nm_mask

FEW = Latency(runs=3, warm_up=0)


def test_sparse_kernels_compute_the_same_and_are_tried_only_where_half_is_zero() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    ).eval()
    assert with_sparse_kernels(network) is None
    with torch.no_grad():
        network[2].weight.mul_(torch.rand(30, 40) > 0.9)
    sparse = with_sparse_kernels(network)
    assert sparse is not None
    assert sparse[0].__class__ is nn.Linear  # type: ignore[index]
    inputs = torch.randn(7, 50)
    with torch.no_grad():
        assert torch.allclose(sparse(inputs), network(inputs), atol=1e-6)
        assert torch.allclose(sparse(inputs[:1]), network(inputs[:1]), atol=1e-6)


@torch.no_grad()
def test_sparse_kernels_take_inputs_with_more_than_two_dimensions() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    layer.weight.mul_(torch.rand(4, 6) < 0.3)
    sparse = with_sparse_kernels(nn.Sequential(layer))
    assert sparse is not None
    for shape in ((3, 6), (2, 5, 6)):
        inputs = torch.randn(shape)
        torch.testing.assert_close(sparse(inputs), layer(inputs))


def perceptron(width: int = 128) -> nn.Sequential:
    """Its second layer is 2:4, the others are dense."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(50, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ).eval()
    with torch.no_grad():
        network[2].weight.mul_(nm_mask(network[2].weight, 2, 4))
    return network


def test_a_weight_is_2_of_4_by_its_zeros_and_its_sizes() -> None:
    weight = torch.randn(32, 64)
    assert not is_2_of_4(weight)
    sparse = weight * nm_mask(weight, 2, 4)
    assert is_2_of_4(sparse)
    assert not is_2_of_4(sparse[:31])
    assert not is_2_of_4(sparse[:, :60])
    sparse[3, 4:8] = torch.tensor([1.0, 0, 1, 1])
    assert not is_2_of_4(sparse)


class Fake24(nn.Module):
    """Computes what the 2:4 layer computes, or something `off`, on any device."""

    off = 0.0

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = HalfLinear(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.off


@pytest.mark.parametrize(
    ("half", "single", "off", "faster"),
    [(2.0, 0.5, 0.0, True), (0.9, 0.5, 0.0, False), (2.0, 3.0, 0.0, False), (2.0, 0.5, 9.0, False)],
    ids=[
        "faster",
        "slower than half precision",
        "slower than single precision",
        "computes something else",
    ],
)
def test_2_of_4_must_be_faster_than_half_and_single_precision_and_right(
    monkeypatch: pytest.MonkeyPatch, half: float, single: float, off: float, faster: bool
) -> None:
    timed: list[list[set[type[nn.Module]]]] = []

    def time_networks(networks: list[nn.Module], inputs: Tensor, options: Latency) -> list[Timing]:
        timed.append([{type(module) for module in network.modules()} for network in networks])
        return [Timing((1.0,) * 3, (speedup,) * 3) for speedup in (1.0, single, half)]

    monkeypatch.setattr(kernels, "time_networks", time_networks)
    monkeypatch.setitem(kernels._LAYERS, "2:4", Fake24)  # type: ignore[arg-type]
    monkeypatch.setattr(Fake24, "off", off)
    tried = kernels._try(perceptron(), torch.randn(5, 50), "2:4", "a GPU", FEW)
    assert tried is not None
    assert tried.faster is faster
    assert [len(each) for each in timed] == [3, 3]
    assert HalfLinear in timed[0][0]
    assert Fake24 not in timed[0][1]
    assert Fake24 in timed[0][2]


def test_without_a_gpu_only_csr_is_tried_and_dense_networks_try_nothing() -> None:
    if has_2_of_4():
        pytest.skip("this machine has 2:4 kernels")
    inputs = torch.randn(5, 50)
    assert [tried.kernel for tried in try_kernels(perceptron(), inputs, FEW)] == ["CSR"]
    assert try_kernels(nn.Linear(50, 10).eval(), inputs, FEW) == []


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_other_files_do_not_load_on_a_gpu(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"network.{kind}"
    path.touch()
    with pytest.raises(UserError, match=f"only safetensors files can, {kind} files load on 'cpu'"):
        load(path, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not has_2_of_4(), reason="no GPU with kernels for 2:4 sparsity")
@torch.no_grad()
def test_2_of_4_kernels_compute_the_same_on_a_gpu_and_load_from_a_file(tmp_path: Path) -> None:
    dense = perceptron(256)
    network, inputs = compact(dense, torch.randn(8, 50)).network, torch.randn(64, 50)
    shipped = Shipped(network, torch.zeros(1, 50), torch.ones(1, 50)).eval()
    path = tmp_path / "network.safetensors"
    save(shipped, inputs, path, "safetensors", sparse_kernels=["2:4"])
    back = load(path, "cuda")
    assert SemiStructuredLinear in {type(module) for module in back.modules()}
    assert SemiStructuredLinear not in {type(module) for module in load(path).modules()}
    for size in (1, 3, 64):
        torch.testing.assert_close(
            back(inputs[:size].cuda()).cpu(), shipped(inputs[:size]), rtol=1e-2, atol=1e-2
        )
    tried = {each.kernel: each for each in try_kernels(shipped, inputs, FEW)}
    assert tried["2:4"].difference < 1e-2
