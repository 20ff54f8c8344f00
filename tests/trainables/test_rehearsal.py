"""What cannot be trained, made compact, kept or shipped is one sentence before training, which
names the module."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.training.rehearsal import rehearse


class Two(nn.Module):
    """Two layers for 8×8 images; what is made of the logits is its kind's."""

    def __init__(self, logits: int = 10) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, logits)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))

    def forward(self, x: Tensor) -> Any:
        """(N, 1, 8, 8) to (N, logits)."""
        return self.head(self.hidden(x))


class Mapped(Two):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.head(self.hidden(x))}


class Forgotten(Two):
    def forward(self, x: Tensor) -> Any:
        self.head(self.hidden(x))


class Pair(Two):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.hidden(x)), x


class Auxiliary(Two):
    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.hidden(x))
        return (logits, logits) if self.training else logits


class Branches(Two):
    def forward(self, x: Tensor) -> Any:
        hidden = self.hidden(x)
        return self.head(2 * hidden if x.mean() > 0 else hidden)


class Draws(Two):
    def forward(self, x: Tensor) -> Any:
        return self.head(nn.functional.dropout(self.hidden(x), 0.5))


class Optional(Two):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, twice: bool = False
    ) -> Any:
        hidden = self.hidden(x) * scale
        if mask is not None:
            hidden = hidden * mask
        return self.head(hidden * 2 if twice else hidden)


class Detached(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach()


class WithoutGradient(Two):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Frozen(Two):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def flat(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).float().mean()


class Needs(Two):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.head(self.hidden(x) * mask)


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, groups=16, padding=1),
        )
        self.out, self.head = nn.Conv2d(32, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        """(N, 1, 8, 8) to (N, 10)."""
        return self.head(
            torch.relu(self.out(torch.relu(self.deep(torch.relu(self.stem(x)))))).mean((2, 3))
        )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )


def candidate(kind: str, **changes: Any) -> Candidate:
    tree: dict[str, Any] = {
        "model": {"factory": f"tests.trainables.test_rehearsal:{kind}"},
        "training": {"epochs": 1},
    }
    return Candidate.model_validate(tree | changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "Mapped",
            {},
            "returns a dict; it must return one tensor, logits, \\(N, 10\\), or task.output",
        ),
        ("Forgotten", {}, "returns None; its forward must return its outputs"),
        ("Pair", {}, "returns a tuple"),
        ("Auxiliary", {}, "returns a tuple"),
        (
            "Two",
            {"model": {"factory": "tests.trainables.test_rehearsal:Two", "args": {"logits": 5}}},
            "gives 5 logits.*10 classes",
        ),
        ("Branches", {}, "Branches.forward cannot be traced.*no format could ship it"),
        ("Branches", {"compaction": {"enabled": False}}, "no format can ship this network"),
        ("Draws", {}, "draws random numbers in evaluation mode"),
        ("Detached", {}, "what Detached.forward returns has no gradient"),
        ("WithoutGradient", {}, "returns has no gradient.* or runs under torch.no_grad"),
        ("Frozen", {}, "no parameter of the network requires a gradient"),
        (
            "Two",
            {
                "task": {
                    "name": "classification",
                    "loss": {"factory": "tests.trainables.test_rehearsal:flat"},
                }
            },
            "the task's loss has no gradient",
        ),
        ("Needs", {}, "Needs raised TypeError.*'mask'"),
        (
            "normed",
            {"training": {"epochs": 1, "batch_size": 359}},
            r"last batch of an epoch, of 1 example: '2' \(BatchNorm1d\)",
        ),
    ],
)
def test_what_fails_is_one_sentence_before_training(
    kind: str, changes: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    epochs: list[object] = []
    with pytest.raises(UserError, match=message) as raised:
        train(candidate(kind, **changes), on_epoch=epochs.append)
    assert not epochs
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("importance", ["gate", "taylor"])
def test_channels_that_all_stay_need_no_rank(importance: str) -> None:
    """The stem's go together, as one unit, which Torch-Pruning cannot rank: the last one stays."""
    sparsifier = {"name": "channels", "sparsity": 0.5, "importance": importance}
    rehearse(candidate("Multiplied", sparsifier=sparsifier))


def test_a_built_in_network_with_a_last_batch_of_one_is_refused_and_other_batches_are_not() -> None:
    model = {"name": "vgg", "depth": 11, "width": 4}
    rehearse(candidate("Two", model=model))
    with pytest.raises(
        UserError, match=r"of 1 example: .*BatchNorm2d.*set training\.batch_size to another number"
    ):
        rehearse(candidate("Two", model=model, training={"epochs": 1, "batch_size": 359}))


def test_optional_arguments_are_what_they_are_when_left_out() -> None:
    rehearse(candidate("Optional"))
    network, inputs = Optional().eval(), torch.randn(4, 1, 8, 8)
    assert [node.op for node in trace(network).graph.nodes].count("placeholder") == 1
    torch.testing.assert_close(compact(network, inputs).network(inputs), network(inputs))


def test_a_network_that_goes_another_way_for_a_larger_batch_is_refused() -> None:
    with pytest.raises(UserError, match="goes another way for other inputs"):
        rehearse(candidate("BySize"))


class BySize(Two):
    def forward(self, x: Tensor) -> Any:
        hidden = self.hidden(x)
        return self.head(hidden if _large(x) else 2 * hidden)


def _large(x: object) -> bool:
    return isinstance(x, Tensor) and len(x) > 8


def test_nothing_of_it_stays() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearse(candidate("normed", sparsifier={"name": "magnitude", "sparsity": 0.5}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_learning_rate_that_diverges_is_no_mistake() -> None:
    rehearse(candidate("normed", training={"epochs": 1, "lr": 1e30}))


def weight_normed(old: bool = False) -> nn.Module:
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_anew_is_refused_by_name_where_something_would_act_on_it(
    old: bool,
) -> None:
    model = {"factory": "tests.trainables.test_rehearsal:weight_normed", "args": {"old": old}}
    for acts in (
        {},
        {"sparsifier": {"name": "channels", "sparsity": 0.5}, "compaction": {"enabled": False}},
    ):
        with pytest.raises(
            UserError, match="the weight of '1' is computed anew in every forward pass"
        ):
            rehearse(candidate("", model=model, **acts))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        """(N, 1, 8, 8) to (N, 10)."""
        return self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(17, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        """(N, 1, 8, 8) to (N, 10)."""
        return self.head(self.rows((x * 16).long().clamp(0, 16).flatten(1)).sum(1))


def test_layers_that_no_sparsifier_reaches_are_named_with_their_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sparse = {
        "sparsifier": {"name": "magnitude", "sparsity": 0.7},
        "compaction": {"enabled": False},
    }
    with caplog.at_level(logging.WARNING):
        rehearse(candidate("Two", **sparse))
        assert not caplog.records
        rehearse(candidate("Recurrent", **sparse))
        assert not caplog.records
        rehearse(candidate("Embedded", **sparse))
    assert "544 of 874 weights stay dense" in caplog.text
    assert "'rows'" in caplog.text


def test_tied_weights_are_pruned_and_made_compact_without_coming_apart() -> None:
    for sparsifier in ({"name": "magnitude", "sparsity": 0.5}, {"name": "nm"}):
        tied = {"factory": "tests.trainables.test_network_file:Tied"}
        trained = train(candidate("", model=tied, sparsifier=sparsifier))
        network = trained.compacted.network
        assert network.get_parameter("a.weight") is network.get_parameter("b.weight")
        assert trained.measures["params"] <= 2 * 64 * 64 + 3 * 64 + 650


class Summed(Embedded):
    def forward(self, x: Tensor) -> Any:
        """(N, 1, 8, 8) to (N, 32)."""
        return self.rows((x * 16).long().clamp(0, 16).flatten(1)).sum(1)


def test_channels_where_none_can_be_removed_names_the_layers_that_no_sparsifier_reaches() -> None:
    channels = {
        "sparsifier": {"name": "channels", "sparsity": 0.5},
        "compaction": {"enabled": False},
    }
    with pytest.raises(
        UserError, match=r"no channel in this network that can be removed.*on weights of 'rows'"
    ):
        rehearse(candidate("Summed", **channels))
    rehearse(candidate("Recurrent", **channels))


class Bessel(Two):
    def forward(self, x: Tensor) -> Any:
        return self.head(torch.special.bessel_j0(self.hidden(x)))


def test_int8_that_no_exporter_takes_is_refused_before_training() -> None:
    kept = {"compaction": {"enabled": False}}
    rehearse(candidate("Bessel", **kept))
    with pytest.raises(UserError, match=r"(?i)onnx|int8"):
        rehearse(candidate("Bessel", int8=True, **kept))


class Mixed(Two):
    def hidden(self, x: Tensor) -> Tensor:
        """Units of `a` that are zero have a share of the softmax, like all others."""
        return torch.relu(self.b(torch.relu(self.a(x.flatten(1))).softmax(1)))


def test_units_that_a_penalty_makes_zero_and_nothing_can_remove_are_named_before_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        rehearse(candidate("Two", penalties={"node": {"strength": 1e-3}}))
        assert not caplog.records
        rehearse(candidate("Mixed", penalties={"node": {"strength": 1e-3, "layers": {"a": 0}}}))
        assert not caplog.records
        rehearse(candidate("Mixed", penalties={"node": {"strength": 1e-3}}))
    assert "penalties.node makes units of 'a' zero" in caplog.text


def test_a_table_of_whole_numbers_that_a_network_does_not_take_gets_advice() -> None:
    plain = {"data": {"factory": "tests.trainables.data.made:ages"}, "model": "mlp"}
    with pytest.raises(UserError, match=r"whole numbers.* set data\.normalise to per_feature"):
        rehearse(Candidate.model_validate(plain))
    plain["data"]["normalise"] = "per_feature"
    rehearse(Candidate.model_validate(plain))
