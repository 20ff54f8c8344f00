"""Strengths in units of the training mean the same in every training."""

from typing import Any

import pytest
import torch
from torch import nn

import slimfront as sf
from slimfront.trainables.errors import UserError
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.penalties.base import ActiveGroups
from slimfront.trainables.penalties.relative import absolute
from slimfront.trainables.training.loop import Training

GROUPS = [name for name in PENALTIES if name not in ("cka", "aug_cka")]
INPUTS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.outer, self.outer_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y = self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        return self.head(torch.relu(x + y).mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def value(slim: sf.Slimming) -> float:
    (penalty,) = slim.acting.penalties
    assert isinstance(penalty, ActiveGroups)
    return sum(float(penalty.norm(group)) for group in penalty.groups.values())


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("lr", "steps"), [(0.1, 20), (0.003, 100)])
def test_half_a_unit_halves_the_penalty_where_nothing_resists(
    name: str, lr: float, steps: int
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    penalties = {name: {"strength": 0.5, "relative": True}}
    with sf.Slimming(model, optimizer, INPUTS, steps=steps, penalties=penalties) as slim:
        before = value(slim)
        for _ in range(steps):
            optimizer.zero_grad()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        assert value(slim) == pytest.approx(before / 2, rel=0.02)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_our_loop_knows_its_schedule_and_a_warmup(schedule: str, optimizer: str) -> None:
    def total(**options: Any) -> float:
        candidate = sf.Candidate.model_validate(
            {
                "model": {"name": "mlp", "depth": 3, "width": 16},
                "training": {"epochs": 6, "schedule": schedule, "optimizer": optimizer},
                "penalties": {"layer": {"strength": 1.0, "relative": True, **options}},
            }
        )
        training = Training(candidate)
        (options_now,) = training.penalty_options
        steps = training.total_steps()
        sizes = [
            training.proximal_step(training.learning_rate(step))
            * options_now.scale(step / training.steps_per_epoch())
            for step in range(steps)
        ]
        assert training.candidate.penalties["layer"].strength == options_now.strength
        return sum(sizes) * options_now.strength

    # What all steps together take off is the same.
    assert total() == pytest.approx(total(warmup=2.0, ramp=2.0), rel=1e-9)


def test_single_layers_are_relative_too() -> None:
    penalties = sf.Candidate.model_validate(
        {"penalties": {"node": {"strength": 1.0, "layers": {"first": 2.0}, "relative": True}}}
    ).penalties
    (found,) = absolute(penalties, network(), INPUTS, lambda _options: 3.0).values()
    assert found.layers["first"] == pytest.approx(2 * found.strength)  # type: ignore[attr-defined]
    assert not found.relative  # type: ignore[attr-defined]


def test_the_weights_are_as_they_were() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    penalties = {name: {"strength": 1.0, "relative": True} for name in GROUPS}
    asked = sf.Candidate.model_validate({"penalties": penalties}).penalties
    absolute(asked, model, INPUTS, lambda _options: 1.0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_checkpoint_keeps_what_strengths_were_relative_to() -> None:
    penalties = {"channel": {"strength": 0.5, "relative": True}}

    def slimming(model: nn.Module) -> sf.Slimming:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return sf.Slimming(model, optimizer, INPUTS, steps=10, penalties=penalties)

    first = slimming(network())
    state = first.state_dict()
    shrunk = network()
    with torch.no_grad():
        for parameter in shrunk.parameters():
            parameter.mul_(0.1)
    again = slimming(shrunk)
    (mine,), (theirs,) = first.acting.penalties, again.acting.penalties
    assert isinstance(mine, ActiveGroups) and isinstance(theirs, ActiveGroups)
    assert theirs.options.strength < mine.options.strength
    again.load_state_dict(state)
    assert theirs.options.strength == mine.options.strength


def test_what_has_no_size_is_refused() -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalties = {"node": {"strength": 1.0, "relative": True}}
    with pytest.raises(UserError, match="relative: the penalty is 0 when"):
        sf.Slimming(model, optimizer, INPUTS, steps=10, penalties=penalties)
    late = {"node": {"strength": 1.0, "relative": True, "warmup": 99}}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="its full strength is never reached"):
        sf.Slimming(model, optimizer, INPUTS, steps=10, penalties=late, steps_per_epoch=1)
