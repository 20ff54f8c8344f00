"""What every sparsifier must do, whatever it is."""

from typing import Any

import pytest
import torch
from torch import nn

from trainables.sparsifiers import SPARSIFIERS
from trainables.sparsifiers.base import ActiveSparsifier, prunable_weights

STEPS = 40


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def run(
    name: str, sparsity: float, *, steps: tuple[int, int] = (0, STEPS), state: dict[str, Any] | None = None
) -> tuple[nn.Module, ActiveSparsifier, dict[str, Any]]:
    """Trains on noise with SGD with momentum and weight decay; `state` continues an earlier run."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparsifier = SPARSIFIERS[name](name=name, sparsity=sparsity).attach(model, STEPS)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sparsifier.load_state_dict(state["sparsifier"])
    for step in range(*steps):
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(16, 10, generator=generator), torch.randint(4, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step(step)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    return model, sparsifier, saved


def zeros(model: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in prunable_weights(model).values())


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_the_target_is_met_to_within_one_weight_per_tensor(name: str, sparsity: float) -> None:
    model, _, _ = run(name, sparsity)
    weights = prunable_weights(model)
    total = sum(w.numel() for w in weights.values())
    assert abs(zeros(model) - sparsity * total) <= len(weights)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_zeros_stay_zero_through_momentum_and_weight_decay(name: str) -> None:
    model, sparsifier, _ = run(name, 0.8)
    for parameter_name, mask in sparsifier.state_dict().items():
        weight = prunable_weights(model)[parameter_name]
        assert not weight[~mask].any()


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_the_same_seed_gives_the_same_mask(name: str) -> None:
    first, second = run(name, 0.8)[1].state_dict(), run(name, 0.8)[1].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
@pytest.mark.parametrize("middle", [3, 15, 35])
def test_a_continued_run_equals_an_uninterrupted_one(name: str, middle: int) -> None:
    whole, _, _ = run(name, 0.8)
    _, _, saved = run(name, 0.8, steps=(0, middle))
    continued, _, _ = run(name, 0.8, steps=(middle, STEPS), state=saved)
    for a, b in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_biases_are_never_dropped(name: str) -> None:
    model, sparsifier, _ = run(name, 0.9)
    assert all(key.endswith("weight") for key in sparsifier.state_dict())
    assert all(module.bias.all() for module in model.modules() if isinstance(module, nn.Linear))
