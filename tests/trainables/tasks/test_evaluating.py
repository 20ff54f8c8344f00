"""Who looks at a network in evaluation mode leaves each of its modules in the mode it was in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.shipping.network_file import check_storable
from slimfront.trainables.structure.channel_groups import channel_groups
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks import Classification
from slimfront.trainables.tasks.evaluating import evaluating


def frozen_norm() -> nn.Sequential:
    """A network in training whose batch norm is not: users freeze them."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(4 * 16, 2))
    network[1].eval()
    return network


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def score(network: nn.Module, inputs: Tensor) -> None:
    options = Classification()
    encoded = options.encode(torch.arange(len(inputs)) % 2)
    task = options.attach(encoded.targets, encoded)
    task.evaluate(network, inputs, encoded.targets)
    task.evaluate_shipped(network, inputs, encoded.targets)


def time(network: nn.Module, inputs: Tensor) -> None:
    time_networks([network, network], inputs, Latency(runs=3))


def test_a_network_is_in_evaluation_mode_within_also_where_one_is_within_another() -> None:
    network = frozen_norm()
    before = modes(network)
    with evaluating(network), evaluating(network):
        assert not any(modes(network))
    assert modes(network) == before
    with pytest.raises(RuntimeError, match="input of size"), evaluating(network):
        network(torch.zeros(1, 1, 2, 2, 2))
    assert modes(network) == before


@pytest.mark.parametrize(
    "user", [score, time, measure, compact, check_storable, channel_groups, trace]
)
def test_a_frozen_batch_norm_stays_frozen(user: Callable[[nn.Module, Tensor], object]) -> None:
    network = frozen_norm()
    before = modes(network)
    assert sorted(set(before)) == [False, True]
    user(network, torch.randn(8, 1, 6, 6))
    assert modes(network) == before
