"""Networks that start from trained weights: the files that people have are read, as data, and what
does not fit is named."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import slimfront as sf
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import MODELS, built
from slimfront.trainables.models.weights import load_weights, read_weights
from slimfront.trainables.training.loop import Training

MLP = {"name": "mlp", "depth": 2, "width": 8}


def network() -> nn.Module:
    torch.manual_seed(5)
    return MODELS.parse_named(MLP).build((64,), 10)


STATE = {name: value.clone() for name, value in network().state_dict().items()}


def plain(path: Path) -> None:
    torch.save(STATE, path.with_suffix(".pt"))


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


FILES: dict[str, tuple[str, Any]] = {
    "a state dict": (".pt", STATE),
    "of DistributedDataParallel": (".pth", prefixed("module.")),
    "of torch.compile in DistributedDataParallel": (".pt", prefixed("module._orig_mod.")),
    "a checkpoint of Lightning": (
        ".ckpt",
        {"epoch": 3, "state_dict": prefixed("model."), "optimizer_states": [{"lr": 0.1}]},
    ),
    "a checkpoint of a loop": (".bin", {"model": STATE, "step": 7}),
    "another checkpoint of a loop": (".bin", {"model_state_dict": STATE, "loss": torch.ones(1)}),
}


@pytest.mark.parametrize("kind", [*FILES, "safetensors"])
def test_a_network_starts_from_the_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    suffix, content = FILES.get(kind, (".safetensors", STATE))
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(content, path)
    other = MODELS.parse_named(MLP).build((64,), 10)
    load_weights(other, str(path))
    for name, value in other.state_dict().items():
        assert torch.equal(value, STATE[name])


def test_training_starts_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "trained.pt")
    monkeypatch.chdir(tmp_path)
    candidate = sf.Candidate.model_validate(
        {"model": MLP | {"weights": "trained.pt"}, "training": {"epochs": 1, "seed": 3}}
    )
    assert candidate.model.weights == str(tmp_path / "trained.pt")
    monkeypatch.chdir("/")  # as the processes of a search
    training = Training(candidate)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, STATE[name])


class Ran(Exception):
    """What a file of a stranger would do."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch ran",)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in STATE.items() if name not in names}


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        (".txt", None, "ends in none of .pt, .pth"),
        (".pt", None, "there is no file"),
        (".pt", b"", "cannot be read as tensors and plain data"),
        (".pt", b"GIF89a", "cannot be read as tensors and plain data"),
        (".safetensors", b"GIF89a", "cannot be read as tensors and plain data"),
        (".pt", Ran(), "cannot be read as tensors and plain data"),
        (".pt", network(), "save the state dict alone"),
        (".pt", [1, 2], "holds no state dict"),
        (".pt", {}, "holds no state dict"),
        (".safetensors", b"\x02" + 7 * b"\0" + b"{}", "holds no state dict"),
        (".pt", {"state_dict": {"epoch": 1}}, "holds no state dict"),
        (".pt", without("1.bias"), "has no '1.bias'"),
        (".pt", STATE | {"head.weight": torch.ones(2)}, "has an unknown 'head.weight'"),
        (".pt", STATE | {"1.weight": torch.ones(8, 32)}, "has the shape (8, 32)"),
        (".pt", {"a": torch.ones(2)}, "it has 'a', and the network '1.weight'"),
        (".pt", {"ema": STATE}, "it has 'ema', and none of 'state_dict', 'model_state_dict'"),
        (".pt", STATE | {"1.bias": STATE["1.bias"] * math.nan}, "'1.bias' in"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    suffix: str, content: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    names = list(STATE)
    assert names[0] == "1.weight", names
    with pytest.raises(sf.UserError) as caught:
        load_weights(network(), str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    made = nn.Sequential(nn.Linear(4, 4))
    made.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    torch.save(made.state_dict(), tmp_path / "masked.pt")
    load_weights(made, str(tmp_path / "masked.pt"))


def test_what_batch_norms_count_may_be_missing_as_in_old_files(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    made = normed()
    state = {name: value for name, value in made.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    other = normed()
    load_weights(other, str(tmp_path / "old.pt"))
    assert torch.equal(other[0].weight, made[0].weight)


def test_what_fits_is_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(without("1.bias") | {"other": torch.ones(1)}, path)
    data = Training(sf.Candidate.model_validate({"model": MLP})).data
    model = MODELS.parse_named(MLP | {"weights": str(path), "strict": False})
    torch.manual_seed(9)
    made = built(model, data)
    assert torch.equal(made.state_dict()["1.weight"], STATE["1.weight"])
    assert not torch.equal(made.state_dict()["1.bias"], STATE["1.bias"])


def test_the_head_of_another_task_is_left_out_and_named(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "weights.pt"
    last = list(STATE)[-1]
    torch.save(STATE | {last: torch.ones(77)}, path)
    made = network()
    load_weights(made, str(path), strict=False)
    assert torch.equal(made.state_dict()["1.weight"], STATE["1.weight"])
    assert f"'{last}' are not in {path}, and are as built" in caplog.text


def test_a_model_of_the_registry_is_for_a_search_to_ask_for() -> None:
    with pytest.raises(UserError, match=r"models:/net/1 is of MLflow's model registry, which a se"):
        read_weights("models:/net/1")
