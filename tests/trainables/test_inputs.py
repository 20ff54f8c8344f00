"""Several inputs go wherever one goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.data.cache import load_shared
from slimfront.trainables.data.cache.datasets import _load_plain
from slimfront.trainables.inputs import Call, Several, described, joined, repeated
from slimfront.trainables.models import built
from slimfront.trainables.packs import Pack, packable
from slimfront.trainables.shipping.network_file import restore, store
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.rehearsal import rehearse
from slimfront.trainables.training.train import train
from tests.marks import often

CPU = torch.device("cpu")
HERE = "tests.trainables.test_inputs"


def data(form: str = "named") -> Any:
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(90, 5, generator=draw), torch.randint(0, 7, (90, 2), generator=draw)
    y = (x[:, 0] > 0).long()
    return ({"x": x, "z": z} if form == "named" else (x, z)), y


class Two(nn.Module):
    """A table and two ids; a third argument keeps its default."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.ids, self.table = nn.Embedding(7, 4), nn.Linear(5, 8)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, outputs)

    def forward(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        both = torch.cat([torch.relu(self.table(x)), self.ids(z).flatten(1)], 1)
        hidden = torch.relu(self.hidden(both))
        hidden = hidden if bias is None else hidden + bias
        return {"hidden": hidden, "out": self.head(hidden)}


def candidate(form: str, **changes: Any) -> Candidate:
    return Candidate.model_validate(
        {
            "task": {"name": "classification", "output": "out"},
            "data": {"factory": f"{HERE}:data", "args": {"form": form}, **changes.pop("data", {})},
            "model": {"factory": f"{HERE}:Two"},
            "training": {"epochs": 12, "batch_size": 8, "lr": 0.02, "seed": 1},
            "sparsifier": {"name": "magnitude", "sparsity": 0.5},
            "one_shot": {"steps": 1},
            "measures": [
                {"name": "rows", "factory": f"{HERE}:rows"},
                {"name": "kb", "factory": f"{HERE}:kilobytes", "on": "onnx"},
            ],
            **changes,
        }
    )


def rows(network: nn.Module, inputs: Any) -> float:
    assert network(inputs).shape == (len(inputs), 2)
    return len(inputs)


def kilobytes(path: str) -> float:
    return Path(path).stat().st_size / 1000


@pytest.mark.parametrize("form", often(["named", "placed"], "named"))
def test_two_inputs_go_through_training_compaction_measures_and_storing(form: str) -> None:
    made = candidate(form)
    rehearse(made)
    done = train(made)
    assert done.measures["val_accuracy"] > 0.8
    assert done.measures["nonzero_params"] < 0.7 * sum(p.numel() for p in Two().parameters())
    assert done.measures["rows"] == 18 and done.measures["kb"] > 1
    assert done.measures["flops"] > 0 and done.measures["peak_activation_bytes"] > 0
    held = load_once(made.data, CPU, made.task)
    network = done.compacted.network
    kept = store(network, made.model, held.input_shape, held.head, held.call)
    back = restore(kept, made.model)
    with torch.no_grad():
        assert torch.equal(back(held.test.inputs), network(held.test.inputs))


@pytest.mark.parametrize("form", ["named", "placed"])
def test_a_pack_of_two_inputs_trains_as_each_does_alone(form: str) -> None:
    members = [candidate(form, training={"epochs": 1, "batch_size": 16, "seed": s}) for s in (1, 2)]
    assert packable(members[0]) is None
    pack = Pack(members)
    trainings = list(pack.members)
    together = pack.run_epoch()
    for made, training in zip(members, trainings, strict=True):
        alone = Training(made)
        found = together[training]
        assert isinstance(found, dict)
        assert found["train_loss"] == pytest.approx(alone.run_epoch()["train_loss"], rel=1e-4)
        alone.close()
    pack.close()


@pytest.mark.slow
def test_the_cache_of_the_node_holds_several_inputs_with_their_names_and_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLIMFRONT_SESSION", "a test of inputs")
    made = candidate("named", data={"in_memory": False})
    first, again = (load_shared(made.data, made.task) for _ in range(2))
    assert first.streamed and again.streamed
    plain = made.data.load(made.task)
    for one in (first, again):
        inputs = one.train.inputs
        assert isinstance(inputs, Several) and list(inputs.named) == ["x", "z"]
        assert (inputs["x"].dtype, inputs["z"].dtype) == (torch.float32, torch.int64)
        assert torch.equal(inputs["z"], plain.train.inputs["z"])  # type: ignore[call-overload]
        assert torch.equal(one.test.targets, plain.test.targets)
    _load_plain.cache_clear()
    assert train(made).measures["val_accuracy"] > 0.8


def test_several_inputs_are_taken_apart_and_put_together_like_one() -> None:
    both = Several({"a": torch.arange(5), "b": torch.arange(10.0).reshape(5, 2)})
    assert len(both) == 5 and both.numel() == 15 and both.nbytes == 80
    assert [len(part) for part in both.split(2)] == [2, 2, 1]
    assert [len(part) for part in both.tensor_split(2)] == [3, 2]
    assert both.index_select(0, torch.tensor([4, 0]))["a"].tolist() == [4, 0]
    assert joined(both[:2], both[3:])["a"].tolist() == [0, 1, 3, 4]  # type: ignore[call-overload]
    assert repeated(both, 3)["b"].shape == (3, 5, 2)  # type: ignore[call-overload]
    assert described(both) == "`a` int64 (N,), `b` float32 (N, 2)"
    twice = both.each(lambda tensor: tensor * 2)
    assert twice["a"].tolist() == [0, 2, 4, 6, 8] and both["a"].tolist() == [0, 1, 2, 3, 4]


def test_how_a_network_is_called_comes_back_from_plain_data() -> None:
    for call in (Call(), Call(("a", "b"), "out"), Call(("0", "1"), 1)):
        assert Call.of(call.as_plain()) == call
    assert Call.of(None) == Call()


def test_the_network_that_is_built_is_the_users_class_with_its_names() -> None:
    made = candidate("named")
    network = built(made.model, load_once(made.data, CPU, made.task))
    assert isinstance(network, Two)
    assert set(dict(network.named_children())) == {"ids", "table", "hidden", "head"}
