"""What every penalty must do, whatever it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.penalties.base import GroupPenalty, check_penalties
from slimfront.trainables.penalties.block import group_norm, shrink_group
from slimfront.trainables.penalties.channel import shrink_units, unit_norms
from slimfront.trainables.penalties.connection import soft_threshold
from slimfront.trainables.penalties.layer import negative_norm, shrink_negative
from slimfront.trainables.penalties.node import row_factors, row_norms
from slimfront.trainables.structure.graph import rows

Group = list[Tensor]


def scale_rows(group: Group, factors: Tensor) -> Group:
    """The rows of [W | b] times `factors`."""
    weight, bias = group
    return [weight * rows(factors, weight), bias * factors]


# Of every group penalty: its value on a group, and its proximal step.
GROUP_PENALTIES: dict[str, tuple[Callable[[Group], Tensor], Callable[[Group, Tensor], Group]]] = {
    "layer": (negative_norm, shrink_negative),
    "node": (lambda g: row_norms(*g).sum(), lambda g, t: scale_rows(g, row_factors(*g, t))),
    "connection": (
        lambda g: torch.stack([x.abs().sum() for x in g]).sum(),
        lambda g, t: [soft_threshold(x, t) for x in g],
    ),
    "block": (group_norm, shrink_group),
    "channel": (
        lambda g: unit_norms(g, _OWNERS, 2).sum(),
        lambda g, t: shrink_units(g, _OWNERS, 2, t),
    ),
}
# Rows that units share, and one of no unit.
_OWNERS = [
    torch.tensor([0, 1, 1]),
    torch.tensor([1, 0, -1]),
]
INPUTS = torch.randn(12, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NAMES = sorted(PENALTIES)
GROUP_NAMES = sorted(GROUP_PENALTIES)


def test_every_group_penalty_is_in_the_suite() -> None:
    assert {name for name, cls in PENALTIES.items() if issubclass(cls, GroupPenalty)} == set(
        GROUP_PENALTIES
    )


def network() -> nn.Module:
    """Convolutions, batch norms, a residual block and linear layers: something for every penalty to
    act on."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        BasicBlock(4, 4, 1),
        nn.Flatten(),
    ]
    return nn.Sequential(
        *layers, nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def steps(
    name: str,
    count: int = 1,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    scale: float = 1.0,
    **options: Any,
) -> nn.Module:
    """The network after optimiser steps of size 0.1 under the penalty alone."""
    model = network()
    active = PENALTIES[name](**options).attach(model, INPUTS)
    stepper = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for step in range(count):
        active.before_batch(step, scale)
        output = model(INPUTS)
        loss = active.loss()
        stepper.zero_grad()
        (output.sum() * 0 + (loss if loss is not None else 0)).backward()
        stepper.step()
        active.proximal(0.1)
    active.close()
    return model


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def random_group(seed: int) -> Group:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 4), (3,))]


@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_changes_nothing(name: str, form: str) -> None:
    options = {"form": form} if name in GROUP_PENALTIES else {}
    assert torch.equal(parameters(steps(name, strength=0.0, **options)), parameters(network()))
    assert torch.equal(
        parameters(steps(name, strength=1.0, scale=0.0, **options)), parameters(network())
    )


@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", NAMES)
def test_a_positive_strength_changes_weights_and_keeps_them_finite(
    name: str, optimizer: type[torch.optim.Optimizer], form: str
) -> None:
    options = {"form": form} if name in GROUP_PENALTIES else {}
    after = parameters(steps(name, 3, optimizer, strength=0.5, **options))
    assert not torch.equal(after, parameters(network()))
    assert after.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_on_the_network(name: str) -> None:
    model = steps(name, strength=1.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_strength_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        PENALTIES[name](strength=-1)


@pytest.mark.parametrize("name", NAMES)
def test_the_strength_warms_up_and_ramps_up(name: str) -> None:
    options = PENALTIES[name](strength=1.0, warmup=2, ramp=4)
    assert [options.scale(epoch) for epoch in (0, 1.9, 2, 3, 6, 9)] == [0, 0, 0, 0.25, 1, 1]
    assert PENALTIES[name](strength=1.0).scale(0) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_ramp_from_a_share_rises_by_the_same_factor_in_each_epoch(name: str) -> None:
    options = PENALTIES[name](strength=3.0, warmup=1, ramp=2, ramp_from=0.01)
    found = [options.scale(epoch) for epoch in (0, 1, 2, 3, 9)]
    assert found == pytest.approx([0, 0.01, 0.1, 1, 1])
    with pytest.raises(ValueError, match="set ramp to the epochs"):
        PENALTIES[name](strength=3.0, ramp_from=0.01)


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_exact_zeros_appear_under_the_proximal_form(name: str) -> None:
    before = int((parameters(network()) == 0).sum())
    zeros = int((parameters(steps(name, 3, strength=1e3)) == 0).sum())
    assert zeros > before


@pytest.mark.parametrize("name", GROUP_NAMES)
@given(seed=st.integers(0, 1000), threshold=st.floats(0.01, 3.0))
def test_the_proximal_step_is_the_argmin_found_numerically(
    name: str, seed: int, threshold: float
) -> None:
    # prox(v) = argmin_x ‖x − v‖²/2 + t·norm(x): the function is convex, so no move from its minimum
    # may be better.
    norm, shrink = GROUP_PENALTIES[name]
    group = random_group(seed)
    step = shrink(group, torch.tensor(threshold, dtype=torch.float64))

    def objective(x: Group) -> float:
        distance = sum(float((a - b).square().sum()) for a, b in zip(x, group, strict=True)) / 2
        return distance + threshold * float(norm(x))

    best = objective(step)
    generator = torch.Generator().manual_seed(seed + 1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            moved = [
                x + size * torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in step
            ]
            assert objective(moved) >= best - 1e-12
    towards_start = [x + 0.01 * (v - x) for x, v in zip(step, group, strict=True)]
    towards_zero = [0.99 * x for x in step]
    assert min(objective(towards_start), objective(towards_zero)) >= best - 1e-12


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_a_threshold_of_zero_changes_nothing_and_nan_stays_visible(name: str) -> None:
    _, shrink = GROUP_PENALTIES[name]
    group = random_group(0)
    assert all(
        torch.equal(a, b) for a, b in zip(shrink(group, torch.tensor(0.0)), group, strict=True)
    )
    group[0][0, 0] = float("nan")
    assert shrink(group, torch.tensor(0.1))[0].isnan().any()


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_stacked_candidates_give_the_same_as_one_by_one(name: str) -> None:
    _, shrink = GROUP_PENALTIES[name]
    groups = [random_group(seed) for seed in range(4)]
    thresholds = torch.tensor([0.1, 0.5, 1.0, 10.0], dtype=torch.float64)
    stacked = [torch.stack(parts) for parts in zip(*groups, strict=True)]
    together = torch.func.vmap(lambda w, b, t: tuple(shrink([w, b], t)))(*stacked, thresholds)
    for index, group in enumerate(groups):
        for part, expected in zip(together, shrink(group, thresholds[index]), strict=True):
            torch.testing.assert_close(part[index], expected)


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_the_gradient_form_passes_gradcheck_and_is_zero_on_zeros(name: str) -> None:
    norm, _ = GROUP_PENALTIES[name]
    group = [x.requires_grad_() for x in random_group(5)]
    assert torch.autograd.gradcheck(lambda *g: norm(list(g)), group)
    zeros = [
        torch.zeros(3, 4, dtype=torch.float64, requires_grad=True),
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
    ]
    norm(zeros).backward()
    assert all(x.grad is not None and not x.grad.any() for x in zeros)


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_a_layer_can_have_a_strength_of_its_own_and_a_wrong_name_is_refused(name: str) -> None:
    attached = PENALTIES[name](strength=1.0).attach(network(), INPUTS)
    first = next(iter(attached.groups))  # type: ignore[attr-defined]
    own = PENALTIES[name](strength=1.0, layers={first: 0.25}).attach(network(), INPUTS)
    assert own.strength(first) == 0.25  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="'nowhere' is not a layer that"):
        PENALTIES[name](layers={"nowhere": 1.0}).attach(network(), INPUTS)


def test_penalties_that_need_no_tracing_work_on_a_network_that_cannot_be_traced() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    for name in ("connection", "cka", "aug_cka"):
        PENALTIES[name](strength=1.0).attach(Moody(), torch.ones(2, 4)).proximal(0.1)
    for name in ("layer", "node", "block"):
        with pytest.raises(UserError, match=r"Moody\.forward cannot be traced"):
            PENALTIES[name](strength=1.0).attach(Moody(), torch.ones(2, 4))


def test_a_penalty_with_nothing_to_act_on_is_refused_before_training() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    sample = torch.zeros(4, 4)
    for name, message in (
        ("layer", "between two ReLUs"),
        ("block", "no residual branch"),
        ("cka", "no two layers"),
    ):
        with pytest.raises(
            UserError, match=rf"penalties\.{name}: there (is|are) no .*{message.split(' ')[-1]}"
        ):
            check_penalties({name: PENALTIES[name](strength=1.0)}, flat, sample)
    check_penalties(
        {name: PENALTIES[name](strength=1.0) for name in ("node", "connection")}, flat, sample
    )
    check_penalties({name: PENALTIES[name](strength=1.0) for name in NAMES}, network(), INPUTS)
