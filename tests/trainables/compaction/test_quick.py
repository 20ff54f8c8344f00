import copy

import torch
from torch import nn

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.structure.tracing.trace import trace


def nested() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    return nn.Sequential(
        nn.Linear(8, 6),
        nn.ModuleDict({"part": inner})["part"],
        nn.Sequential(inner[0], nn.Linear(6, 2)),
    )


def test_modules_are_found_in_dictionaries_and_nothing_else_changes() -> None:
    model = nested()
    inputs = torch.randn(3, 8)
    quick = make_quick(trace(model))
    assert "getattr" not in quick.code
    assert quick.code.count('self._modules["') == sum(
        node.op == "call_module" for node in quick.graph.nodes
    )
    assert torch.equal(quick(inputs), model(inputs))


def test_copies_look_up_their_own_modules() -> None:
    inputs = torch.randn(3, 8)
    quick = make_quick(trace(nested()))
    other = copy.deepcopy(quick)
    with torch.no_grad():
        other.get_submodule("0").weight.mul_(2)
    assert not torch.equal(other(inputs), quick(inputs))
    assert "getattr" not in other.code


def test_compact_and_restored_networks_are_quick_and_can_be_made_smaller_again() -> None:
    inputs = torch.randn(3, 8)
    network = compact(nested(), inputs).network
    restored = deserialise(serialise(network))  # type: ignore[arg-type]
    for one in (network, restored, compact(restored, inputs).network):
        assert "getattr" not in one.code  # type: ignore[operator]
        assert torch.allclose(one(inputs), network(inputs))
