"""Channel sparsity: what layers share goes from all of them in the same step, and compaction
removes it."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MODELS
from slimfront.trainables.penalties.base import check_penalties
from slimfront.trainables.penalties.channel import ChannelSparsity, shrink_units, unit_norms
from slimfront.trainables.structure.channel_groups import UnitGroup, channel_groups
from slimfront.trainables.structure.head_groups import head_groups
from slimfront.trainables.training.optimizers import build_optimizer
from tests.trainables.networks import Mixed, Transformer, damage_batch_norms

SHAPES = {"mixed": (3, 8, 8), "resnet20": (1, 8, 8), "transformer": (1, 8, 8)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "transformer":
        return Transformer()
    return (
        Mixed()
        if name == "mixed"
        else MODELS[name](name=name, depth=20, width=8).build(SHAPES[name], outputs=5)
    )


def slow_step(
    tensors: list[Tensor], owners: list[Tensor], units: int, threshold: float
) -> list[Tensor]:
    """The proximal operator, unit by unit and row by row."""
    found = [tensor.clone() for tensor in tensors]
    for unit in range(units):
        entries = [
            x
            for t, o in zip(tensors, owners, strict=True)
            for r in range(len(t))
            if o[r] == unit
            for x in t[r].flatten()
        ]
        size = sum(float(x) ** 2 for x in entries) ** 0.5
        for tensor, owner in zip(found, owners, strict=True):
            for row in range(len(tensor)):
                if owner[row] == unit:
                    tensor[row] *= max(0.0, 1 - threshold / size) if size else 0.0
    return found


@given(seed=st.integers(0, 1000), threshold=st.floats(0.0, 4.0), units=st.integers(1, 3))
def test_the_step_is_that_of_each_unit_by_itself_and_rows_of_no_unit_stay(
    seed: int, threshold: float, units: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 2, 3), (4,), (6, 2))
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    owners = [torch.randint(-1, units, (len(t),), generator=generator) for t in tensors]
    step = shrink_units(tensors, owners, units, torch.tensor(threshold, dtype=torch.float64))
    for fast, slow, tensor, owner in zip(
        step, slow_step(tensors, owners, units, threshold), tensors, owners, strict=True
    ):
        torch.testing.assert_close(fast, slow)
        assert torch.equal(fast[owner == -1], tensor[owner == -1])
    # Optimality: 0 is in the subgradient. v − x = t·x/‖x‖ where a unit stays, ‖v‖ ≤ t where it
    # went.
    before, after = (unit_norms(group, owners, units) for group in (tensors, step))
    torch.testing.assert_close(after, (before - threshold).clamp(min=0))


def test_one_strength_shrinks_groups_of_few_and_of_many_layers_at_about_the_same_pace() -> None:
    model = build("resnet20")
    active = ChannelSparsity(strength=1.0).attach(model, torch.randn(2, 1, 8, 8))

    @torch.no_grad()
    def norms() -> Tensor:
        return torch.stack(
            [unit_norms(g.tensors, g.owners, g.units).mean() for g in active.groups.values()]
        )

    before = norms()
    active.proximal(0.1)
    paces = 1 - norms() / before
    assert {len(group.tensors) for group in active.groups.values()} > {3}
    assert paces.max() < 1.5 * paces.min()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("resnet20", "sgd"), ("resnet20", "adam"), ("mixed", "adam"), ("transformer", "adam")],
)
def test_training_leaves_units_that_are_zero_in_every_writer_and_that_compaction_removes(
    name: str, optimizer: str
) -> None:
    model = build(name)
    if name == "mixed":
        damage_batch_norms(model)
    generator = torch.Generator().manual_seed(1)
    inputs, labels = (
        torch.randn(16, *SHAPES[name], generator=generator),
        torch.randint(5, (16,), generator=generator),
    )
    active = ChannelSparsity(strength=10.0).attach(model, inputs)
    step_size = 0.005
    stepper = build_optimizer(optimizer, model.parameters(), step_size, 0.0, 0.0)  # type: ignore[arg-type]
    heads = head_groups(model)
    groups = [*channel_groups(model, inputs), *heads]
    parameters = dict(model.named_parameters())
    units = sum(group.units for group in groups)

    def dead(groups: Sequence[UnitGroup]) -> int:
        return sum(int((~group.alive(parameters)).sum()) for group in groups)

    for step in range(60):
        active.before_batch(step, 1.0)
        stepper.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        stepper.step()
        active.proximal(step_size)
        if dead(groups) > units / 4 and (not heads or dead(heads)):
            break
    assert units / 4 < dead(groups) < units
    for group in groups:
        alive = group.alive(parameters)
        for parameter, owners in group.writers.items():
            assert not parameters[parameter][owners >= 0][~alive[owners[owners >= 0]]].any()
    compacted = compact(model, inputs)  # raises if the outputs differ
    assert compacted.report.count("units removed")
    assert bool(compacted.report.count("heads removed")) == bool(heads)
    assert compacted.report.after["params"] < measure(model, inputs)["params"]
    left = channel_groups(compacted.network, inputs)
    now = dict(compacted.network.named_parameters())
    assert all(group.alive(now).all() or group.alive(now).sum() <= 1 for group in left), (
        "a zeroed unit is still there"
    )


def test_the_gradient_form_pushes_in_the_same_direction() -> None:
    model = build("resnet20")
    active = ChannelSparsity(strength=1.0, form="gradient").attach(model, torch.randn(2, 1, 8, 8))
    loss = active.loss()
    assert loss is not None
    loss.backward()
    for group in active.groups.values():
        norms = unit_norms(group.tensors, group.owners, group.units)
        for tensor, owners in zip(group.tensors, group.owners, strict=True):
            size = (norms[owners] / group.weight).view(-1, *[1] * (tensor.dim() - 1))
            torch.testing.assert_close(tensor.grad, tensor / size)
    active.proximal(1.0)  # nothing in this form
    torch.testing.assert_close(loss, active.loss())


def test_what_it_cannot_act_on_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    one_layer, sample = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), torch.randn(2, 1, 8, 8)
    with pytest.raises(
        UserError,
        match=(
            r"penalties\.channel: there is no channel and no head in this network "
            r"that can be removed; leave it out"
        ),
    ):
        check_penalties({"channel": ChannelSparsity(strength=1.0)}, one_layer, sample)
    with pytest.raises(
        UserError,
        match=r"'3\.conv' is not a layer that ChannelSparsity acts on; did you mean '3\.conv1'",
    ):
        ChannelSparsity(layers={"3.conv": 1.0}).attach(build("resnet20"), sample)

    def fails(*_: object) -> None:
        raise KeyError("strange")

    monkeypatch.setattr("slimfront.trainables.structure.channel_groups._graph", fails)
    with pytest.raises(
        UserError,
        match=(
            r"^penalties\.channel: Torch-Pruning cannot analyse the network, "
            r".*strange.*; leave it out"
        ),
    ):
        ChannelSparsity(strength=1.0).attach(one_layer, sample)
    assert ChannelSparsity(strength=1.0).attach(build("resnet20"), sample).targets > 10
