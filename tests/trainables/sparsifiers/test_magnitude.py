import pytest
import torch
from torch import nn

from slimfront.trainables.sparsifiers.magnitude import Magnitude
from tests.trainables.sparsifiers.made import attach


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1, 101).view(10, 10))
        model[1].weight.copy_(torch.arange(101, 201).view(10, 10))
    return model


def zeros_after(options: Magnitude, steps: int = 10) -> list[list[int]]:
    model = network()
    active = attach(options, model, steps=steps)
    history = []
    for step in range(steps):
        active.after_step(step)
        history.append([int((layer.weight == 0).sum()) for layer in model])
    return history


def test_global_compares_all_layers_and_uniform_each_alone() -> None:
    assert zeros_after(Magnitude(sparsity=0.5, every=1))[-1] == [100, 0]
    assert zeros_after(Magnitude(sparsity=0.5, every=1, densities="uniform"))[-1] == [50, 50]


def test_the_schedule_starts_and_ends_where_it_is_told() -> None:
    history = [sum(z) for z in zeros_after(Magnitude(sparsity=0.5, start=0.3, end=0.6, every=1))]
    assert history[:4] == [0, 0, 0, 0]
    assert history[4] > 0
    assert history[5] < 100
    assert history[6:] == [100] * 4


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_target_is_met_at_the_last_step_whatever_the_schedule(start: float, end: float) -> None:
    assert sum(zeros_after(Magnitude(sparsity=0.5, start=start, end=end, every=7))[-1]) == 100


def test_a_schedule_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start \(0.9\) is after end \(0.2\)"):
        Magnitude(start=0.9, end=0.2)
