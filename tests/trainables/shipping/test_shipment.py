"""What is shipped was checked in a fresh process; what is not right leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.data import Dataset, Digits
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.latency import Latency, Timing
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.shipping import Shipped, load, ship
from slimfront.trainables.shipping.card import card
from slimfront.trainables.shipping.kernels import CsrLinear, Tried

FEW = Latency(runs=3, warm_up=0)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Digits().load()


@pytest.fixture(scope="module")
def trained(data: Dataset) -> nn.Module:
    """A small network that knows digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.inputs), data.train.targets).backward()
        optimizer.step()
    with torch.no_grad():
        model[1].weight[:16] = 0
        model[1].bias[:16] = 0
    return compact(model, data.validation.inputs).network


@pytest.fixture
def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_a_shipped_file_takes_raw_inputs_and_has_the_accuracies_of_the_network(
    tmp_path: Path, data: Dataset, trained: nn.Module, dense: nn.Module, kind: str
) -> None:
    path = tmp_path / f"network.{kind}"
    shipment = ship(trained, dense, data, path, kind, latency=FEW)  # type: ignore[arg-type]
    assert shipment.difference < 1e-5
    assert shipment.checked == len(data.validation.targets) + len(data.test.targets)
    assert shipment.scores == shipment.trained_scores
    assert shipment.scores["test_accuracy"] == pytest.approx(
        data.task.evaluate(trained, *data.test, "test")["test_accuracy"], abs=1e-6
    )
    from sklearn.datasets import load_digits

    # 0 … 16, as they come.
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    right = load(path)(pixels).argmax(1) == torch.tensor(load_digits().target)
    assert right.float().mean() > 0.9
    assert shipment.measures["file_bytes"] == path.stat().st_size
    assert (
        shipment.measures["params"]
        == measure(trained, data.validation.inputs)["params"]
        == 48 * 64 + 48 + 480 + 10
    )
    assert set(shipment.timings) == {1, 64}
    assert [file.name for file in tmp_path.iterdir()] == [path.name], (
        "something was left beside the file"
    )


@pytest.mark.slow
def test_int8_is_smaller_and_its_accuracy_is_its_own(
    tmp_path: Path, data: Dataset, trained: nn.Module, dense: nn.Module
) -> None:
    whole = ship(trained, dense, data, tmp_path / "whole.onnx", "onnx", latency=FEW)
    int8 = ship(trained, dense, data, tmp_path / "int8.onnx", "onnx", int8=True, latency=FEW)
    assert int8.measures["file_bytes"] < 0.75 * whole.measures["file_bytes"]
    assert int8.difference > 1e-4
    assert int8.scores["test_accuracy"] > whole.scores["test_accuracy"] - 0.03
    with pytest.raises(UserError, match="int8 networks ship as onnx"):
        ship(trained, dense, data, tmp_path / "int8.pt2", "pt2", int8=True)


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path,
    data: Dataset,
    trained: nn.Module,
    dense: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def writes_another(
        network: Shipped, inputs: torch.Tensor, path: Path, kind: str, **_: object
    ) -> None:
        from slimfront.trainables.shipping import formats

        with torch.no_grad():
            other = Shipped(
                compact(dense, data.validation.inputs).network, network.mean, network.std
            )
            formats.save(other, inputs, path, kind)  # type: ignore[arg-type]

    monkeypatch.setattr("slimfront.trainables.shipping.shipment.save", writes_another)
    with pytest.raises(
        UserError, match="the pt2 file computes something else: its outputs are off by"
    ):
        ship(trained, dense, data, tmp_path / "network.pt2", "pt2", latency=FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_fresh_process_cannot_load_is_not_kept(
    tmp_path: Path,
    data: Dataset,
    trained: nn.Module,
    dense: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "slimfront.trainables.shipping.shipment.save",
        lambda _n, _i, path, _k, **_: path.write_bytes(b"nothing"),
    )
    with pytest.raises(
        UserError, match="the pt2 file could not be loaded in a fresh process: "
    ) as caught:
        ship(trained, dense, data, tmp_path / "network.pt2", "pt2", latency=FEW)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_to_are_refused_before_any_work(
    tmp_path: Path,
    data: Dataset,
    trained: nn.Module,
    dense: nn.Module,
) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(UserError, match=r"there\.pt2 is there already"):
        ship(trained, dense, data, tmp_path / "there.pt2")
    assert (tmp_path / "there.pt2").read_text() == "mine"
    with pytest.raises(UserError, match="there is no directory"):
        ship(trained, dense, data, tmp_path / "nowhere" / "network.pt2")
    # Tests may run as root, who may write nearly anywhere.
    with pytest.raises(UserError, match="cannot write to /proc: "):
        ship(trained, dense, data, Path("/proc/network.pt2"))


@pytest.mark.parametrize(
    ("name", "faster", "uses"),
    [
        ("a.safetensors", True, ["CSR"]),
        ("b.safetensors", False, []),
        pytest.param("c.pt2", True, [], marks=pytest.mark.slow),
    ],
)
def test_a_safetensors_file_gets_sparse_kernels_where_they_were_faster(
    tmp_path: Path,
    data: Dataset,
    dense: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    faster: bool,
    uses: list[str],
) -> None:
    tried = Tried(
        "CSR", "this CPU", {size: Timing((1.0,) * 3, (2.0,) * 3) for size in (1, 64)}, 1e-7, faster
    )
    monkeypatch.setattr("slimfront.trainables.shipping.shipment.try_kernels", lambda *_: [tried])
    with torch.no_grad():
        dense[1].weight.mul_(torch.rand(64, 64) > 0.8)  # type: ignore[index, union-attr, operator]
    network = compact(dense, data.validation.inputs[:64]).network
    path = tmp_path / name
    shipment = ship(network, dense, data, path, path.suffix[1:], latency=FEW)  # type: ignore[arg-type]
    assert shipment.sparse_kernels == uses
    assert (CsrLinear in {type(module) for module in load(path).modules()}) is bool(uses)
    assert shipment.difference < 1e-4


def test_the_card_has_what_was_measured_and_runs(
    tmp_path: Path,
    data: Dataset,
    trained: nn.Module,
    dense: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipment = ship(trained, dense, data, tmp_path / "network.pt2", latency=FEW)
    text = card(
        shipment,
        "one of mine",
        data,
        "digits",
        {"epochs": 60},
        [["1", "units removed", "16 units"]],
    )
    assert (
        f"| this file | {shipment.scores['val_accuracy']:.4f} | "
        f"{shipment.scores['test_accuracy']:.4f} |" in text
    )
    assert f"| parameters | {3610:,} | {4810:,} | 75.1% |" in text
    assert "- units removed: `1`" in text
    assert "- epochs: 60" in text
    monkeypatch.chdir(tmp_path)
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {"inputs": data.raw(data.test.inputs[:3])}
    exec(code, names)
    logits = names["outputs"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (3, 10)
