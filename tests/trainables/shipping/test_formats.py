"""Every format brings every network back as it was, and a file that is damaged is refused with one
sentence."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import MODELS
from slimfront.trainables.shipping import FORMATS, Format, Shipped, load, save
from slimfront.trainables.structure.targets.layers import hidden_layers
from slimfront.trainables.structure.tracing.trace import trace
from tests.marks import each_once
from tests.trainables.compaction.test_networks import NETWORKS as OURS
from tests.trainables.networks import Mixed, Transformer, damage_batch_norms

NETWORKS: dict[str, dict[str, Any]] = OURS | {"mixed": {}}
SHAPE = (3, 8, 8)
IMAGES = torch.randint(
    0, 256, (5, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def shipped(name: str, *, dead: float = 0.3, **options: Any) -> Shipped:
    """A compact network with dead channels, behind a normalisation of images."""
    torch.manual_seed(0)
    chosen = NETWORKS[name] | options
    model = (
        Mixed() if name == "mixed" else MODELS[name](name=name, **chosen).build(SHAPE, outputs=5)
    )
    damage_batch_norms(model)
    with torch.no_grad():
        for layer in hidden_layers(trace(model)):
            layer.scale_rows(
                (torch.rand(layer.layer.weight.shape[0]) >= dead).to(layer.layer.weight)
            )
    mean, std = torch.full((3, 1, 1), 120.0), torch.full((3, 1, 1), 60.0)
    network = compact(model.eval(), (IMAGES - mean) / std).network
    return Shipped(network, mean, std).eval()


@pytest.mark.parametrize(("name", "kind"), each_once(NETWORKS, FORMATS))
@torch.no_grad()
def test_every_network_comes_back_from_every_format_for_batches_of_any_size(
    tmp_path: Path, name: str, kind: Format
) -> None:
    network, path = shipped(name), tmp_path / f"network.{kind}"
    save(network, IMAGES, path, kind)
    back = load(path)
    for size in (1, 5):
        wanted = network(IMAGES[:size])
        got = back(IMAGES[:size])
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(("batch_first", "kind"), each_once([True, False], FORMATS))
@torch.no_grad()
def test_a_transformer_without_some_of_its_heads_comes_back_from_every_format(
    tmp_path: Path, batch_first: bool, kind: Format
) -> None:
    torch.manual_seed(0)
    model, path = Transformer(batch_first=batch_first).eval(), tmp_path / f"network.{kind}"
    model.blocks[0].attention.in_proj_weight[36:40] = 0  # type: ignore[union-attr, operator, index]
    images = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
    mean, std = torch.full((1, 1, 1), 5.0), torch.full((1, 1, 1), 6.0)
    compacted = compact(model, (images - mean) / std)
    assert compacted.report.count("heads removed") == 1
    network = Shipped(compacted.network, mean, std).eval()
    save(network, images, path, kind)
    back = load(path)
    for size in (1, 5):
        wanted, got = network(images[:size]), back(images[:size])
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    depth=st.integers(1, 5),
    width=st.integers(1, 24),
    dead=st.floats(0, 0.9),
    kind=st.sampled_from(["pt2", "safetensors", "onnx"]),
)
@torch.no_grad()
def test_perceptrons_of_any_shape_come_back(
    tmp_path: Path, depth: int, width: int, dead: float, kind: Format
) -> None:
    network = shipped("mlp", dead=dead, depth=depth, width=width)
    path = tmp_path / f"network.{kind}"
    save(network, IMAGES, path, kind)
    wanted = network(IMAGES)
    assert float((load(path)(IMAGES) - wanted).abs().max() / wanted.abs().max()) < 1e-5


@functools.cache
def saved(kind: Format) -> bytes:
    """A file of a format, which takes seconds to write in some."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"network.{kind}")
        save(shipped("mlp"), IMAGES, path, kind)
        return path.read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_refused_with_one_sentence(
    tmp_path: Path, kind: Format, damage: str
) -> None:
    path = tmp_path / f"network.{kind}"
    content = saved(kind)
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"\x00nothing" * 50, "empty": b""}[
            damage
        ]
    )
    with pytest.raises(UserError, match=f"network.{kind} cannot be read as {kind}: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the suffix says no format; known: \.pt2, \.onnx, \.safetensors"
    ):
        load(tmp_path / "network.pkl")
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "network.pt2")
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was not written by slimfront"):
        load(tmp_path / "other.safetensors")


def test_safetensors_refuses_a_network_that_was_not_compacted(tmp_path: Path) -> None:
    network = Shipped(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.tensor(0.0), torch.tensor(1.0)
    )
    with pytest.raises(UserError, match="safetensors holds networks that were compacted"):
        save(network, IMAGES, tmp_path / "network.safetensors", "safetensors")


def test_what_torch_cannot_export_is_refused_with_one_sentence(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    network = Shipped(Branching(), torch.tensor(0.0), torch.tensor(1.0))
    for kind in ("pt2", "onnx"):
        with pytest.raises(UserError, match="does not take this network") as caught:
            save(network, IMAGES, tmp_path / f"network.{kind}", kind)
        assert "\n" not in str(caught.value)


def test_onnx_that_is_not_installed_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "slimfront.trainables.shipping.formats.find_spec",
        lambda name: None if name == "onnxruntime" else object(),
    )
    with pytest.raises(
        UserError, match=r"needs onnxruntime; install it by: pip install 'slimfront\[onnx\]'"
    ):
        save(shipped("mlp"), IMAGES, tmp_path / "network.onnx", "onnx")


def test_what_torch_onnx_does_not_take_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation\nand a long graph")

    monkeypatch.setattr(torch.onnx, "export", fails)
    shipped = Shipped(nn.Linear(3, 2).eval(), None, None).eval()
    with pytest.raises(UserError, match=r"^torch\.onnx does not take this network: no such .*n$"):
        save(shipped, torch.randn(2, 3), tmp_path / "network.onnx", "onnx")
