from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MLP, MODELS, Factory
from slimfront.trainables.shipping.network_file import check_storable, read, restore, store
from tests.trainables.networks import Transformer


class Moody(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("compacted", [True, False])
def test_a_network_comes_back_bit_identical_compacted_or_not(
    tmp_path: Path, compacted: bool
) -> None:
    options = MLP(depth=2, width=5)
    network = options.build((1, 2, 2), 3).eval()
    inputs = torch.randn(4, 1, 2, 2)
    kept = compact(network, inputs).network if compacted else network
    torch.save(store(kept, options, (1, 2, 2), 3), tmp_path / "network.pt")
    restored = restore(torch.load(tmp_path / "network.pt", weights_only=True), options)
    assert torch.equal(restored(inputs), kept(inputs))
    assert not restored.training


def test_what_cannot_be_kept_is_found_before_training() -> None:
    check_storable(MLP().build((4,), 2), torch.randn(3, 4))
    with pytest.raises(
        UserError,
        match=r"Moody\.forward cannot be traced.*without compaction no format could ship it",
    ):
        check_storable(Moody(), torch.ones(1, 2))
    check_storable(nn.Sequential(nn.Linear(2, 2), nn.Tanhshrink()), torch.ones(1, 2))


def test_options_of_modules_come_back() -> None:
    sample = torch.randn(2, 1, 4, 4)
    for module in (nn.AvgPool2d(2, divisor_override=1), nn.LayerNorm(4, bias=False)):
        check_storable(nn.Sequential(module, nn.ReLU()), sample)


class Positioned(nn.Module):
    """Reads parameters, buffers, a shape and slices in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.arange(3.0))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) to (N, 1, 3)."""
        x = (x[:, 1:] * self.scale + self.shift) * self.mask
        return x.view(x.shape[0], 1, -1)


def test_parameters_and_buffers_that_the_code_reads_come_back(tmp_path: Path) -> None:
    network, sample = Positioned().eval(), torch.randn(2, 4)
    check_storable(network, sample)
    kept = compact(network, sample).network
    torch.save(store(kept, MLP(), (4,), 3), tmp_path / "network.pt")
    restored = restore(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.equal(restored(sample), network(sample))
    # With torch from 2.14 on, a traced network keeps that `mask` is not part of its state.
    assert restored.state_dict().keys() >= kept.state_dict().keys()
    assert [name for name, _ in restored.named_parameters()] == ["scale"]
    assert [name for name, _ in restored.named_buffers()] == ["shift", "mask"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_can_be_kept_with_a_padding_mask_too_and_others_are_refused_before_training(
    batch_first: bool,
) -> None:
    sample = torch.randn(3, 1, 8, 8)
    model = Transformer(batch_first=batch_first)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check_storable(model, sample)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

    class Padded(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(1).view(-1, 8, 8)
            rows = self.embed(rows)
            out: Tensor = self.blocks[0].attention(rows, rows, rows, rows[:, :, 0])[0][:, 0]  # type: ignore[operator, union-attr]
            return out

    class Read(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.embed(x.flatten(1).view(-1, 8, 8))
            out: Tensor = self.blocks[0].attention(rows, rows, rows)[1][:, 0]  # type: ignore[operator, union-attr]
            return out

    check_storable(Padded(), sample)
    with pytest.raises(
        UserError,
        match=r"'blocks\.0\.attention' has its attention weights read.*set compaction\.enabled: ",
    ):
        check_storable(Read(), sample)


def traced(tmp_path: Path) -> dict[str, Any]:
    """What a small network is stored as."""
    return store(
        compact(MLP(depth=1, width=3).build((4,), 2), torch.randn(3, 4)).network, MLP(), (4,), 2
    )


RUNS = "__import__('pathlib').Path('ran').touch()"


def damaged(stored: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same, with code where a name should be."""
    nodes = stored["nodes"]
    first = next(node for node in nodes if node["op"] == "call_module")
    if kind == "a default argument":
        nodes[0]["target"] = f"x={RUNS}"
    elif kind == "a module's name":
        stored["modules"][f'a"),{RUNS},("'] = stored["modules"][first["target"]]
        first["target"] = f'a"),{RUNS},("'
    elif kind == "a keyword":
        first["kwargs"] = {f"y={RUNS},z": 1}
    elif kind == "a method":
        first |= {"op": "call_method", "target": "numpy"}
    elif kind == "a function":
        first |= {"op": "call_function", "target": "os:system"}
    elif kind == "a node's name":
        first["name"] = f"x = {RUNS}"
    elif kind == "a private attribute":
        stored["modules"]["__class__.a"] = stored["modules"][first["target"]]
    elif kind == "a kind of module":
        stored["modules"][first["target"]]["kind"] = "os.system"
    return stored


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "a default argument",
            "a module's name",
            "a keyword",
            "a method",
            "a function",
            "a node's name",
            "a private attribute",
        ),
        "a kind of module",
    ],
)
def test_nothing_in_a_file_becomes_code(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(damaged(traced(tmp_path), kind), tmp_path / "network.pt")
    with pytest.raises(
        UserError, match=r"network\.pt is damaged, or was not written by slimfront: "
    ):
        read(tmp_path / "network.pt", MLP()).forward(torch.ones(2, 4))
    assert not Path("ran").exists()


def ran() -> nn.Module:
    Path("ran").touch()
    return nn.Linear(4, 2)


def test_a_factory_that_a_file_names_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = Factory(factory="tests.trainables.test_network_file:ran")
    torch.save(store(nn.Linear(4, 2), named, (4,), 2), tmp_path / "network.pt")
    for model in (None, MLP(), Factory(factory="torch.nn:Linear")):
        with pytest.raises(UserError, match="the config"):
            read(tmp_path / "network.pt", model)
    assert not Path("ran").exists()
    assert read(tmp_path / "network.pt", named)(torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.parametrize("compacted", [True, False])
def test_a_flipped_byte_anywhere_in_a_file_is_noticed(tmp_path: Path, compacted: bool) -> None:
    model = MLP(depth=1, width=3)
    network = model.build((4,), 2).eval()
    kept = compact(network, torch.randn(3, 4)).network if compacted else network
    file = tmp_path / "network.pt"
    torch.save(store(kept, model, (4,), 2), file)
    whole = file.read_bytes()
    expected = {name: tensor.clone() for name, tensor in read(file, model).state_dict().items()}
    for place in range(0, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with suppress(UserError):  # else it is in the padding between parts
            found = read(file, model).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04" + b"\0" * 50])
def test_what_is_no_network_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "network.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged, or was not written by slimfront"):
        read(file)
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "other.pt")
    torch.save({"format": 2, "modules": [], "nodes": 3}, file)
    with pytest.raises(UserError, match="damaged, or was not written by slimfront"):
        read(file)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="it holds a list"):
        read(file)


class Tied(nn.Module):
    """Two layers that share one weight, and a stem and a head of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 10),
        )
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = torch.relu(self.stem(x.flatten(1)))
        out: Tensor = self.head(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


@pytest.mark.parametrize("compacted", [True, False])
def test_tied_weights_are_counted_and_stored_once_and_tied_after_loading(
    tmp_path: Path, compacted: bool
) -> None:
    torch.manual_seed(0)
    network, inputs = Tied().eval(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        network.a.weight[:20] = 0
        network.b.bias[3] = network.a.bias[5] = -1
    sizes = measure(network, inputs)
    kept = compact(network, inputs).network if compacted else network
    options = MODELS.parse_named(
        {"name": "factory", "factory": "tests.trainables.test_network_file:Tied"}
    )
    torch.save(store(kept, options, (1, 8, 8), 10), tmp_path / "network.pt")
    restored = restore(torch.load(tmp_path / "network.pt", weights_only=True), options)
    after = measure(restored, inputs)
    assert after["params"] <= sizes["params"] == 2 * 64 * 64 + 3 * 64 + 650
    assert (tmp_path / "network.pt").stat().st_size < 4 * sizes["params"] + 12_000
    assert after["bytes"] < 4 * sizes["params"] + 6_000
    assert restored.get_parameter("a.weight") is restored.get_parameter("b.weight")
    assert torch.equal(restored(inputs), kept(inputs))
    torch.testing.assert_close(kept(inputs), network(inputs))
