"""Modules get their modes back, each its own."""

import pytest
import torch
from torch import nn

from slimfront.trainables.compaction.compact import compact
from slimfront.trainables.shipping.network_file import check_storable
from slimfront.trainables.structure.channel_groups import channel_groups
from slimfront.trainables.structure.graph import trace
from slimfront.trainables.tasks.evaluating import evaluating


def frozen_norm() -> nn.Sequential:
    """A network in training whose batch norm is not: users freeze them."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(4 * 16, 2))
    network[1].eval()
    return network


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def test_a_network_is_in_evaluation_mode_within_and_as_it_was_afterwards() -> None:
    network = frozen_norm()
    before = modes(network)
    assert sorted(set(before)) == [False, True]
    with evaluating(network):
        assert not any(modes(network))
    assert modes(network) == before
    with pytest.raises(RuntimeError, match="input of size"), evaluating(network):
        network(torch.zeros(1, 1, 2, 2, 2))
    assert modes(network) == before


@pytest.mark.parametrize("user", [compact, check_storable, channel_groups, trace])
def test_a_frozen_batch_norm_stays_frozen(user: object) -> None:
    network = frozen_norm()
    before = modes(network)
    user(network, torch.randn(8, 1, 6, 6))  # type: ignore[operator]
    assert modes(network) == before
