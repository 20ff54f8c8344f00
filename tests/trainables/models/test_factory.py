"""Networks that users bring."""

from typing import Any

import pytest
import torch
from torch import nn

from slimfront import Candidate, train
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import MODELS


def two_towers(width: int = 8) -> nn.Module:
    """A network that is not ours: two branches of equal depth, concatenated."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(
                nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
            self.right = nn.Sequential(
                nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
            self.head = nn.Linear(2 * width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.flatten(x, 1)
            logits: torch.Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1))
            return logits

    return Towers()


def not_a_network() -> int:
    return 3


HERE = "tests.trainables.models.test_factory"


def test_a_network_by_import_path_is_trained_and_compacted() -> None:
    tree: dict[str, Any] = {
        "model": {"factory": f"{HERE}:two_towers", "args": {"width": 12}},
        "training": {"epochs": 3, "lr": 0.01, "seed": 0},
        "penalties": {"layer": {"strength": 1000.0}},
    }
    candidate = Candidate.model_validate(tree)
    assert Candidate.model_validate(candidate.model_dump(mode="json")) == candidate
    trained = train(candidate)
    assert trained.measures["val_accuracy"] > 0.5
    assert trained.history[-1]["active_layers"] == 0
    assert trained.compacted.report.count("inactive") == 2


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (f"{HERE}:two_tower", "did you mean 'two_towers'?"),
        ("nowhere.at.all:x", "there is no module 'nowhere'"),
        ("no colon", "an import path has the form package.module:name"),
        (f"{HERE}:not_a_network", "returned a int; it must be a torch.nn.Module"),
        (
            f"{HERE}:two_towers",
            "raised TypeError: two_towers\\(\\) got an unexpected keyword argument 'depth'",
        ),
    ],
)
def test_a_factory_that_does_not_work_is_explained(factory: str, message: str) -> None:
    options = MODELS.parse_named(
        {"factory": factory, "args": {"depth": 1} if "unexpected" in message else {}}
    )
    with pytest.raises(UserError, match=message.replace("?", "\\?")):
        options.build((1, 8, 8), 10)
