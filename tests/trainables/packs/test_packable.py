from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.packs import Pack, packable
from slimfront.trainables.penalties.base import GroupPenalty
from tests.trainables.packs.made import candidates, convolutions
from tests.trainables.penalties.test_conformance import NAMES as PENALTY_NAMES


class Moody(nn.Module):
    """Control flow that depends on the data, or something random, or parameters that are not
    trained or not used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(64, 10)
        self.spare = nn.Linear(2, 2) if how == "spare" else None
        if how == "frozen":
            self.layer.bias.requires_grad_(False)
        if how == "mixed":
            self.layer.float()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.how == "flow" and x.sum() > 0:
            x = -x
        if self.how == "noise" and self.training:
            x = x + torch.randn_like(x)
        out: Tensor = self.layer(x)
        return out


def dropout(rate: float) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(rate), nn.Linear(8, 10))


def mixed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10).float())


def factory(name: str, **args: Any) -> dict[str, Any]:
    return {
        "name": "factory",
        "factory": f"tests.trainables.packs.test_packable:{name}",
        "args": args,
    }


REFUSED = {
    "dropout": (factory("dropout", rate=0.5), "the model's '2' drops at random"),
    "transformer": (
        {"factory": "tests.trainables.networks:Transformer"},
        "'blocks.0.attention' drops at random",
    ),
    "flow": (factory("Moody", how="flow"), "torch.func.vmap refuses it"),
    "noise": (factory("Moody", how="noise"), "torch.func.vmap refuses it"),
    "frozen": (factory("Moody", how="frozen"), "parameters that are not trained"),
    "spare": (factory("Moody", how="spare"), "does not use its parameter 'spare.weight'"),
    "mixed": (factory("mixed"), "parameters of several types"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_pack_is_refused_in_one_sentence(name: str) -> None:
    model, message = REFUSED[name]
    (candidate,) = candidates(1, model=model)
    reason = packable(candidate)
    assert reason is not None
    assert message in reason
    assert reason.endswith("pack to 1")
    assert "\n" not in reason
    with pytest.raises(UserError, match="pack to 1"):
        Pack([candidate])


def test_halving_batches_where_memory_runs_out_is_refused() -> None:
    (candidate,) = candidates(1, out_of_memory="halve")
    assert "training.out_of_memory: halve" in (packable(candidate) or "")


@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_all_our_models_and_penalties_pack(form: str) -> None:
    penalties = {n: {"strength": 1.0} for n in PENALTY_NAMES}
    for name in penalties:
        from slimfront.trainables.penalties import PENALTIES

        if issubclass(PENALTIES[name], GroupPenalty):
            penalties[name]["form"] = form  # type: ignore[assignment]
    models: list[dict[str, Any]] = [
        {"name": "mlp", "width": 8},
        {"name": "lenet", "width": 0.5},
        {"name": "vgg", "width": 2, "depth": 11},
    ]
    models += [
        {"name": "resnet20", "width": 2, "depth": 8},
        {"name": "resnet18", "width": 2, "depth": 1},
    ]
    models += [
        factory("dropout", rate=0.0),
        {"factory": "tests.trainables.packs.made:convolutions"},
    ]
    for model in models:
        (candidate,) = candidates(1, model=model, options=[{"penalties": penalties}])
        assert packable(candidate) is None
    assert convolutions()
