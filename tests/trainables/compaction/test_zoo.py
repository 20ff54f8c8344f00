"""The small part of the zoo, of torch alone: `make zoo` has the rest."""

import copy
import time

import pytest
import torch

from benchmarks import zoo_pruning
from benchmarks.zoo import _problem, examined
from benchmarks.zoo_networks import NETWORKS, PLAIN
from benchmarks.zoo_steps import Row, examine
from slimfront.trainables.inputs import Call
from slimfront.trainables.models import adapted


def row(name: str) -> Row:
    told: list[Row] = []
    examine(name, told.append)
    assert told[-1]["at"] == "end"
    return told[-1]


@pytest.mark.parametrize("name", ["conv1d", "two-inputs", "control-flow-on-data"])
def test_a_network_shrinks_is_stored_and_comes_out_or_is_refused(name: str) -> None:
    assert _problem(row(name)) == ""


@pytest.mark.parametrize("name", PLAIN)
def test_half_of_the_units_are_zero_and_the_outputs_still_say_something(name: str) -> None:
    torch.manual_seed(0)
    network = adapted(NETWORKS[name].build(), NETWORKS[name].call)
    network.eval()
    inputs = NETWORKS[name].inputs(6, torch.Generator().manual_seed(0))
    zeros = zoo_pruning.by_layers(network, inputs)
    assert zoo_pruning.zero(network, zeros) > 0
    with torch.no_grad():
        made = network(inputs)
    assert (made.amax(0) - made.amin(0)).max() > 1e-6


def test_what_is_zeroed_is_what_torch_pruning_alone_removes() -> None:
    torch.manual_seed(0)
    of = NETWORKS["conv3d"]
    network = of.build().eval()
    inputs = of.inputs(3, torch.Generator().manual_seed(0))
    before = copy.deepcopy(network.state_dict())
    zeros = zoo_pruning.by_groups(network, Call(), inputs)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    zoo_pruning.zero(network, zeros)
    pruned = zoo_pruning.pruned_alone(network, Call(), inputs)
    assert sum(p.numel() for p in pruned.parameters()) < 0.5 * sum(
        p.numel() for p in network.parameters()
    )
    torch.testing.assert_close(pruned(inputs), network(inputs))


@pytest.mark.slow
def test_a_network_that_does_not_end_is_one_row() -> None:
    start = time.monotonic()
    rows = list(examined(["mlp", "unet"], seconds=0.01))
    assert time.monotonic() - start < 60
    assert [row["network"] for row in rows] == ["mlp", "unet"]
    assert all("did not end in time" in str(row["faults"]) for row in rows)
