import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimfront.trainables.penalties.layer import LayerSparsity, negative_norm, shrink_negative


def random_group(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 4), (3,))]


def test_the_norm_is_that_of_the_negative_entries_of_the_whole_group() -> None:
    group = [torch.tensor([[3.0, -3.0]]), torch.tensor([-4.0])]
    assert negative_norm(group) == 5.0


@given(st.integers(0, 1000), st.floats(0.01, 2.0))
def test_the_proximal_step_agrees_with_many_gradient_steps(seed: int, threshold: float) -> None:
    group = random_group(seed)
    norm = float(negative_norm(group))
    step = shrink_negative(group, torch.tensor(threshold, dtype=torch.float64))
    # Inside, the objective is smooth at the solution, whose gradient must vanish.
    if norm > 2 * threshold:
        leaves = [x.clone().requires_grad_() for x in step]
        distance = sum((a - b).square().sum() for a, b in zip(leaves, group, strict=True)) / 2
        (distance + threshold * negative_norm(leaves)).backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert leaf.grad.abs().max() < 1e-9


def test_a_threshold_above_the_norm_gives_exact_zeros_and_leaves_positive_entries_alone() -> None:
    group = random_group(0)
    step = shrink_negative(group, negative_norm(group) * 1.001)
    for before, after in zip(group, step, strict=True):
        assert torch.equal(after, before.clamp(min=0))


def test_a_group_without_negative_entries_stays_as_it_is() -> None:
    group = [torch.rand(2, 2), torch.zeros(2)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(shrink_negative(group, torch.tensor(1.0)), group, strict=True)
    )


def test_only_inner_layers_are_pushed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    LayerSparsity(strength=1e6).attach(model, torch.zeros(1, 4)).proximal(1.0)
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, True, False, False]
    assert (model[2].weight >= 0).all()
    assert (model[2].bias >= 0).all()


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_threshold_is_step_size_times_strength(strength: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    ).double()
    group = [p.detach().clone() for p in model[2].parameters()]
    LayerSparsity(strength=strength).attach(model, torch.zeros(1, 4)).proximal(0.1)
    for parameter, expected in zip(
        model[2].parameters(), shrink_negative(group, torch.tensor(0.1 * strength)), strict=True
    ):
        torch.testing.assert_close(parameter.detach(), expected)
