"""What sets SET, RigL and GraNet apart."""

import pytest
import torch

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers import SET, GraNet, RigL
from slimfront.trainables.sparsifiers.schedules import cubic_sparsity
from tests.trainables.sparsifiers.made import STEPS, attach, train


@pytest.mark.parametrize(
    "options", [SET(sparsity=0.8, every=10, end=1.0), RigL(sparsity=0.8, every=10, end=1.0)]
)
def test_the_number_of_weights_of_each_layer_stays_and_their_places_change(
    options: SET | RigL,
) -> None:
    active = attach(options)
    start = {name: mask.clone() for name, mask in active.masks.items()}
    counts = []
    train(
        active, watch=lambda _: counts.append([int(mask.sum()) for mask in active.masks.values()])
    )
    assert all(count == [int(mask.sum()) for mask in start.values()] for count in counts)
    assert any(not torch.equal(start[name], active.masks[name]) for name in start)


def test_set_moves_its_share_at_random_and_new_weights_get_random_values() -> None:
    active = attach(SET(sparsity=0.8, every=10, start=0.25, drop=0.5))
    train(active, (0, 10))
    before, smallest = active.masks["0.weight"].clone(), active.weights["0.weight"].abs().clone()
    train(active, (10, 11))
    after = active.masks["0.weight"]
    grown = after & ~before
    assert 0 < int(grown.sum()) <= int(0.5 * int(before.sum()))
    assert smallest[before & ~after].max() < smallest[before].max()
    values = active.weights["0.weight"][grown]
    assert values.all()
    assert len(values.unique()) == len(values)
    # A linear layer starts uniform in ±1/√in.
    assert float(values.detach().std()) == pytest.approx(1 / (3 * 20) ** 0.5, rel=0.3)


def test_rigl_grows_the_largest_gradients_from_zero() -> None:
    active = attach(RigL(sparsity=0.8, every=10))
    train(active, (0, 10))
    mask, weight = active.masks["0.weight"].clone(), active.weights["0.weight"]
    gradients: dict[str, torch.Tensor] = {}
    before_step = active.before_step

    def spy(step: int) -> None:
        assert weight.grad is not None
        gradients["dense"] = weight.grad.abs().clone()
        before_step(step)

    active.before_step = spy  # type: ignore[method-assign]
    train(active, (10, 11))
    moved = active.masks["0.weight"]
    grown = moved & ~mask
    assert int(grown.sum())
    assert not weight[grown].any()
    assert gradients["dense"][grown].min() >= gradients["dense"][~moved & ~mask].max()


def test_rigl_moves_less_and_less() -> None:
    active = attach(RigL(sparsity=0.5, every=6, drop=0.5, end=0.9))
    shares = []
    before_step = active.before_step

    def watch(step: int) -> None:
        if active.updates.due(step):  # type: ignore[attr-defined]
            shares.append(int((active.masks["0.weight"] & ~before["mask"]).sum()))

    before: dict[str, torch.Tensor] = {}

    def spy(step: int) -> None:
        before["mask"] = active.masks["0.weight"].clone()
        before_step(step)

    active.before_step = spy  # type: ignore[method-assign]
    train(active, watch=watch)
    assert shares[0] > shares[-2] > shares[-1] == 0


def test_granet_follows_the_cubic_schedule_from_its_initial_sparsity() -> None:
    active = attach(GraNet(sparsity=0.9, every=5, end=0.5))
    total = sum(mask.numel() for mask in active.masks.values())
    history = []
    train(
        active,
        watch=lambda _: history.append(
            1 - sum(int(mask.sum()) for mask in active.masks.values()) / total
        ),
    )
    for step in range(STEPS):
        last_update = min(step // 5 * 5, 20)
        assert history[step] == pytest.approx(
            cubic_sparsity(last_update / 20, 0.9, 0.5), abs=2 / total
        )


def test_granet_with_a_target_below_its_initial_sparsity_starts_there() -> None:
    active = attach(GraNet(sparsity=0.3, every=5))
    total = sum(mask.numel() for mask in active.masks.values())
    assert sum(int((~mask).sum()) for mask in active.masks.values()) == pytest.approx(
        0.3 * total, abs=3
    )


@pytest.mark.parametrize(
    "options",
    [SET(sparsity=0.8, every=30), RigL(sparsity=0.8, every=31), GraNet(sparsity=0.8, every=100)],
)
def test_updates_further_apart_than_training_is_long_are_refused(
    options: SET | RigL | GraNet,
) -> None:
    with pytest.raises(
        UserError, match=rf"sparsifier\.every \({options.every}\) is longer than|hardly move"
    ):
        attach(options.model_copy(update={"every": 31}))
