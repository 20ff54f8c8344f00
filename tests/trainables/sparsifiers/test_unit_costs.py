"""What units cost is what is gone without them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.sparsifiers.unit_costs import Currency, UnitCosts, worth_least
from slimfront.trainables.structure.removable import removable_units


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 4, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 7),
        nn.ReLU(),
        nn.Linear(7, 2),
    )


INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("currency", ["params", "flops"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_the_cost_is_that_of_the_compact_network(currency: Currency, seed: int) -> None:
    model = network()
    groups = removable_units(model, INPUTS)
    costs = UnitCosts(model, groups, INPUTS, currency)
    generator = torch.Generator().manual_seed(seed)
    alive = {}
    parameters = dict(model.named_parameters())
    for group in groups:
        alive[group.name] = torch.rand(group.units, generator=generator) < 0.6
        alive[group.name][0] = True
        with torch.no_grad():
            for name, owners in group.writers.items():
                rows = group.rows(name, parameters[name])
                rows[~alive[group.name][owners.clamp(min=0)] & (owners >= 0)] = 0
    compacted = compact(model, INPUTS)
    found = measure(compacted.network, INPUTS)[currency]
    assert costs.whole == pytest.approx(measure(model, INPUTS)[currency] / _per(currency))
    assert costs.total(alive) == pytest.approx(found / _per(currency))


def test_a_weight_that_two_layers_share_costs_as_often_as_both_use_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.between = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.between(torch.relu(self.first(x))))
            out: torch.Tensor = self.second(x)
            return out

    inputs = torch.randn(4, 8)
    costs = UnitCosts(Tied(), [], inputs, "flops")
    assert costs.whole == 3 * 8 * 8


def _per(currency: Currency) -> int:
    """Each number of a weight is multiplied and added: two FLOPs."""
    return 2 if currency == "flops" else 1


@given(share=st.floats(0.05, 0.9), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_no_more_goes_than_is_needed(share: float, seed: int) -> None:
    model = network()
    groups = removable_units(model, INPUTS)
    costs = UnitCosts(model, groups, INPUTS, "params")
    generator = torch.Generator().manual_seed(seed)
    everything = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    allowed = (1 - share) * costs.whole
    stay = worth_least(scores, costs, everything, allowed)
    assert all(units.any() for units in stay.values())
    if allowed < costs.least():
        return
    assert costs.total(stay) <= allowed
    # With any one unit more of those that went last it would cost too much, but for small change.
    dearest = max(float(of_group.max()) for of_group in costs.of_units(everything).values())
    assert costs.total(stay) > allowed - dearest


def test_what_is_gone_stays_gone_and_the_best_of_each_group_stays() -> None:
    model = network()
    groups = removable_units(model, INPUTS)
    costs = UnitCosts(model, groups, INPUTS, "flops")
    alive = {group.name: torch.arange(group.units) < 2 for group in groups}
    scores = {group.name: torch.arange(group.units).float() for group in groups}
    stay = worth_least(scores, costs, alive, 0.0)
    for units in stay.values():
        assert units.nonzero().flatten().tolist() == [1]
