"""Which units can be removed is found whatever the weights happen to hide."""

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.structure import removable
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.removable import removable_groups, removable_together

INPUTS = torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(1))


class Pooled(nn.Module):
    """A pool over the units of a layer: its maxima are those of neighbours."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.second = nn.Linear(6, 8), pool, nn.Linear(8, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 6) to (N, 3)."""
        out: Tensor = self.head(self.second(torch.relu(self.pool(self.first(x)))).flatten(1))
        return out


def pooled() -> nn.Module:
    """Unit 4 of `first` is zero, and those beside it are never seen to be the largest: units 2 and
    6 are, on all usual inputs."""
    torch.manual_seed(0)
    model = Pooled(nn.MaxPool2d((1, 3), 1, (0, 1))).double().eval()
    with torch.no_grad():
        model.first.weight.abs_().mul_(0.01)
        model.first.bias.copy_(torch.tensor([0.5, 0.5, 2, 0.5, 0, 0.5, 2, 0.5]))
        model.first.weight[4] = 0
        model.second.weight[:, 4] = 0
    return model


def test_a_removal_that_only_these_weights_hide_is_not_done() -> None:
    model = pooled()
    inputs = INPUTS.double()
    network = compact(model, inputs).network
    torch.testing.assert_close(network(inputs), model(inputs))
    torch.testing.assert_close(network(inputs * 1e4), model(inputs * 1e4))


@pytest.mark.parametrize(
    ("pool", "names"),
    [(nn.Identity(), ["first"]), (nn.MaxPool2d((1, 3), 1, (0, 1)), [])],
)
def test_units_that_a_pool_mixes_are_no_targets(pool: nn.Module, names: list[str]) -> None:
    torch.manual_seed(0)
    found = [group.name for group in removable_groups(Pooled(pool), INPUTS)]
    assert [name for name in found if name == "first"] == names


def test_the_network_that_is_asked_about_stays_as_it_is() -> None:
    model = pooled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dead = {"first": torch.arange(8) == 4}
    removable_together(model, INPUTS.double(), dead)
    removable_groups(model, INPUTS.double())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_asking_before_training_costs_one_copy_and_six_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies, runs = [], []

    def counted(network: nn.Module) -> nn.Module:
        copies.append(network)
        return copied(network)

    monkeypatch.setattr(removable, "copied", counted)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    assert len(removable_groups(model, INPUTS[:, 0, 0])) == 2
    assert len(copies) == 1
    assert len(runs) <= 6
