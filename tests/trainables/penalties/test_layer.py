import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainables.penalties.layer import LayerSparsity, negative_norm, shrink_negative


def random_group(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 4), (3,))]


def test_the_norm_is_that_of_the_negative_entries_of_the_whole_group() -> None:
    group = [torch.tensor([[3.0, -3.0]]), torch.tensor([-4.0])]
    assert negative_norm(group) == 5.0


@given(st.integers(0, 1000), st.floats(0.01, 3.0))
def test_the_proximal_step_is_the_argmin_found_numerically(seed: int, threshold: float) -> None:
    # prox(v) = argmin_x ‖x − v‖²/2 + t‖neg(x)‖: no small random move from it may be better.
    group = random_group(seed)
    step = shrink_negative(group, torch.tensor(threshold, dtype=torch.float64))

    def objective(x: list[torch.Tensor]) -> float:
        distance = sum((a - b).square().sum() for a, b in zip(x, group, strict=True)) / 2
        return float(distance + threshold * negative_norm(x))

    best = objective(step)
    generator = torch.Generator().manual_seed(seed + 1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = [x + size * torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in step]
            assert objective(moved) >= best - 1e-12


@given(st.integers(0, 1000), st.floats(0.01, 2.0))
def test_the_proximal_step_agrees_with_many_gradient_steps(seed: int, threshold: float) -> None:
    group = random_group(seed)
    norm = float(negative_norm(group))
    step = shrink_negative(group, torch.tensor(threshold, dtype=torch.float64))
    if norm > 2 * threshold:  # inside, the objective is smooth at the solution, whose gradient must vanish
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


def test_a_threshold_of_zero_changes_nothing() -> None:
    group = random_group(3)
    assert all(torch.equal(a, b) for a, b in zip(shrink_negative(group, torch.tensor(0.0)), group, strict=True))


def test_a_group_without_negative_entries_stays_as_it_is() -> None:
    group = [torch.rand(2, 2), torch.zeros(2)]
    assert all(torch.equal(a, b) for a, b in zip(shrink_negative(group, torch.tensor(1.0)), group, strict=True))


def test_nan_stays_visible() -> None:
    assert shrink_negative([torch.tensor([float("nan"), -1.0])], torch.tensor(0.1))[0].isnan().any()


def test_stacked_groups_give_the_same_as_one_by_one() -> None:
    groups = [random_group(seed) for seed in range(4)]
    thresholds = torch.tensor([0.1, 0.5, 1.0, 10.0], dtype=torch.float64)
    stacked = [torch.stack(parts) for parts in zip(*groups, strict=True)]
    together = torch.func.vmap(lambda w, b, t: tuple(shrink_negative([w, b], t)))(*stacked, thresholds)
    for index, group in enumerate(groups):
        for part, expected in zip(together, shrink_negative(group, thresholds[index]), strict=True):
            torch.testing.assert_close(part[index], expected)


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
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    group = [p.detach().clone() for p in model[2].parameters()]
    LayerSparsity(strength=strength).attach(model, torch.zeros(1, 4)).proximal(0.1)
    for parameter, expected in zip(model[2].parameters(), shrink_negative(group, torch.tensor(0.1 * strength)), strict=True):
        torch.testing.assert_close(parameter.detach(), expected)
