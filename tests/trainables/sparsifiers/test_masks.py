import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimfront.trainables.sparsifiers.masks import (
    choose_masks,
    drop_and_grow,
    erdos_renyi_kernel,
    top_mask,
)
from slimfront.trainables.sparsifiers.schedules import cosine_decay, cubic_sparsity

shapes = st.lists(
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(torch.Size), min_size=1, max_size=5
)


@given(shapes=shapes, sparsity=st.floats(0, 0.99))
def test_erk_densities_are_at_most_one_and_add_up_to_the_target(
    shapes: list[torch.Size], sparsity: float
) -> None:
    named = {str(number): shape for number, shape in enumerate(shapes)}
    densities = erdos_renyi_kernel(named, sparsity)
    total = sum(math.prod(shape) for shape in shapes)
    assert sum(densities[n] * math.prod(s) for n, s in named.items()) == pytest.approx(
        (1 - sparsity) * total
    )
    assert all(0 <= density <= 1 for density in densities.values())
    # Layers that are not full are in the proportion of their raw densities.
    free = {n: densities[n] / (sum(s) / math.prod(s)) for n, s in named.items() if densities[n] < 1}
    assert all(value == pytest.approx(next(iter(free.values()))) for value in free.values())


def test_erk_by_hand() -> None:
    # Raw densities 26/1440 and 14/48 over 1,440 and 48 weights: ε (26 + 14) = 0.1 · 1488.
    densities = erdos_renyi_kernel(
        {"conv": torch.Size([10, 16, 3, 3]), "linear": torch.Size([6, 8])}, 0.9
    )
    scale = 148.8 / (10 + 16 + 3 + 3 + 6 + 8)
    assert densities["conv"] == pytest.approx(scale * 32 / 1440)
    assert densities["linear"] == pytest.approx(scale * 14 / 48)


@given(seed=st.integers(0, 100), kept=st.integers(0, 24))
def test_the_highest_scores_are_kept_exactly_even_with_ties(seed: int, kept: int) -> None:
    scores = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(seed)).float()
    mask = top_mask(scores, kept)
    assert int(mask.sum()) == kept
    if 0 < kept < 24:
        assert scores[mask].min() >= scores[~mask].max()


def test_global_ranks_all_layers_together_and_uniform_each_alone() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0, 20.0)}
    assert [int(m.sum()) for m in choose_masks(scores, 0.5, "global").values()] == [0, 10]
    assert [int(m.sum()) for m in choose_masks(scores, 0.5, "uniform").values()] == [5, 5]


@given(seed=st.integers(0, 1000), active=st.integers(0, 30), share=st.floats(0, 1))
def test_dropping_and_growing_keeps_the_count_and_moves_the_right_ones(
    seed: int, active: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = top_mask(torch.rand(5, 6, generator=generator), active)
    magnitude, growth = (torch.rand(5, 6, generator=generator) for _ in range(2))
    count = int(share * active)
    moved = drop_and_grow(mask, magnitude, growth, count)
    assert int(moved.sum()) == active
    # The slow way, index by index.
    inside = sorted(
        (i for i in range(30) if mask.flatten()[i]), key=lambda i: float(magnitude.flatten()[i])
    )
    stay = set(inside[count:])
    outside = sorted(
        (i for i in range(30) if i not in stay), key=lambda i: -float(growth.flatten()[i])
    )
    assert {i for i in range(30) if moved.flatten()[i]} == stay | set(outside[:count])


def test_the_cubic_schedule_rises_from_the_initial_sparsity_to_the_target() -> None:
    values = [cubic_sparsity(p / 10, 0.8) for p in range(11)]
    assert values[0] == 0
    assert values[5] == pytest.approx(0.8 * (1 - 0.5**3))
    assert values == sorted(values)
    assert cubic_sparsity(2.0, 0.8) == pytest.approx(0.8)
    assert cubic_sparsity(-1.0, 0.8) == 0
    assert cubic_sparsity(0.0, 0.9, initial=0.5) == pytest.approx(0.5)
    assert cubic_sparsity(0.5, 0.9, initial=0.5) == pytest.approx(0.9 - 0.4 / 8)


def test_the_cosine_decay_falls_from_the_initial_share_to_zero() -> None:
    assert [cosine_decay(p, 0.3) for p in (0, 0.5, 1, 2)] == pytest.approx([0.3, 0.15, 0, 0])
