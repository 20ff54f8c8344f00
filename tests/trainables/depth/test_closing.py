"""Whole layers that close while a network is trained."""

import io
import logging
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs.packable import packable
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.rehearsal import rehearse
from slimfront.trainables.training.train import train
from tests.marks import often

EPOCHS = 6
"""Two of the whole network, one in which layers close, and three without them."""


class Inverted(nn.Module):
    """An inverted residual block, wider, depthwise, narrow again, between two convolutions."""

    def __init__(self, shape: Any = None, outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 48, 1, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False)
        self.norm_two = nn.BatchNorm2d(48)
        self.project = nn.Conv2d(48, 8, 1, bias=False)
        self.norm_three = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, 8, 8)
        x = self.act(self.stem_norm(self.stem(x)))
        hidden = self.act(self.norm(self.expand(x)))
        hidden = self.act(self.norm_two(self.depthwise(hidden)))
        x = x + self.norm_three(self.project(hidden))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def inverted() -> nn.Module:
    return Inverted()


RESNET = {"name": "resnet20", "width": 4, "depth": 14}
INVERTED = {"factory": "tests.trainables.depth.test_closing:inverted"}


def candidate(model: dict[str, Any] | None = None, **changes: Any) -> Candidate:
    base: dict[str, Any] = {
        "model": model or RESNET,
        "training": {"epochs": EPOCHS, "batch_size": 256, "lr": 0.01, "seed": 5},
        "depth": {"layers": 2},
        "one_shot": {"steps": 0},
    }
    return Candidate.model_validate(base | changes)


def gone(steps: Any) -> list[str]:
    return [name for name, action, _ in steps if action == "pruned"]


def test_layers_are_chosen_close_and_are_gone() -> None:
    training = Training(candidate(), "cpu")
    assert training.closing is not None
    found = []
    states = []
    opens = []
    try:
        for _ in range(EPOCHS):
            training.run_epoch()
            found.append(training.finish(one_shot=False))
            states.append(training.closing.state)
            opens.append(float(training.closing._open))
    finally:
        training.close()
    assert states == ["whole", "whole", "closing", *["closed"] * 3]
    assert opens[2:] == [0, 0, 0, 0]
    layers = [trained.measures["layers"] for trained in found]
    assert layers[0] == layers[1] == layers[2]
    assert layers[3] == layers[5] < layers[0]
    assert len(gone(found[5].compacted.report.steps)) == 2
    assert not gone(found[1].compacted.report.steps)


def test_until_layers_are_chosen_training_is_that_of_the_whole_network() -> None:
    closing = train(candidate())
    whole = train(candidate(depth={}))
    losses = [[epoch["train_loss"] for epoch in trained.history] for trained in (closing, whole)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("model", [RESNET, INVERTED], ids=["resnet", "inverted"])
def test_what_is_made_compact_computes_what_was_trained(model: dict[str, Any]) -> None:
    """At each epoch, with layers half open too."""
    training = Training(candidate(model, depth={"layers": 1, "criterion": "entropy"}), "cpu")
    assert training.closing is not None
    inputs = training.data.prepare(training.data.validation.inputs[:64])
    try:
        for _ in range(EPOCHS):
            training.run_epoch()
            if training.closing.state == "closing":
                training.closing.at(training.step - 2)
                assert 0 < float(training.closing._open) < 1
            compact = training.finish(one_shot=False).compacted.network
            with torch.no_grad():
                network = training.network.eval()
                assert torch.allclose(compact(inputs), network(inputs), rtol=1e-3, atol=1e-4)
    finally:
        training.close()


def test_an_inverted_residual_block_is_one_convolution_at_the_end() -> None:
    found = train(candidate(INVERTED, depth={"layers": 1, "criterion": "entropy"}))
    network = found.compacted.network
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert gone(found.compacted.report.steps) == ["expand"]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3), (3, 3)]
    assert found.measures["layers"] == 3


@pytest.mark.parametrize("epoch", often([1, 2, 3, 4, EPOCHS], 2, 4))
@pytest.mark.parametrize("model", [RESNET, INVERTED], ids=["resnet", "inverted"])
def test_a_training_goes_on_bit_exactly(epoch: int, model: dict[str, Any]) -> None:
    asked = candidate(
        model,
        depth={"layers": 1, "criterion": "entropy"},
        penalties={"node": {"strength": 1e-3}},
        sparsifier={"name": "rigl", "sparsity": 0.5, "every": 3},
    )
    ends = []
    file = io.BytesIO()
    for stop in (0, epoch):
        training = Training(asked, "cpu")
        try:
            while training.epoch < stop:
                training.run_epoch()
            if stop:
                torch.save(training.state_dict(), file)
                file.seek(0)
                training.close()
                training = Training(asked, "cpu")
                training.load_state_dict(torch.load(file, weights_only=True))
            while not training.done:
                training.run_epoch()
            ends.append(training.finish(one_shot=False))
        finally:
            training.close()
    first, second = ends
    assert first.measures == second.measures
    weights = zip(
        first.compacted.network.state_dict().values(),
        second.compacted.network.state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in weights)


def test_penalties_and_sparsifiers_act_and_what_is_gone_is_not_counted() -> None:
    asked = candidate(
        penalties={"node": {"strength": 1e-3}, "cka": {"strength": 1e-3}},
        sparsifier={"name": "magnitude", "sparsity": 0.5},
    )
    rehearse(asked)
    training = Training(asked, "cpu")
    try:
        whole = sum(weight.numel() for weight in training.weights)
        for _ in range(EPOCHS):
            last = training.run_epoch()
        assert sum(weight.numel() for weight in training.weights) < whole
        assert last["penalty_loss"] > 0
        assert 0.3 < last["sparsity"] < 0.7
    finally:
        training.close()


def test_where_there_are_fewer_layers_all_go_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training(candidate(depth={"layers": 50}), "cpu")
    try:
        with caplog.at_level(logging.WARNING):
            while not training.done:
                training.run_epoch()
            found = training.finish(one_shot=False)
    finally:
        training.close()
    count = len(gone(found.compacted.report.steps))
    assert count > 1
    assert f"depth.layers: 50: {count} layers were taken out; no more" in caplog.text


def test_more_layers_than_there_are_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"^depth.layers: 50: no more than \d+ can be taken out"):
        rehearse(candidate(depth={"layers": 50}))


def measures_of(target: dict[str, Any] | None) -> dict[str, float]:
    return dict(train(candidate(depth={"target": target} if target else {})).measures)


@pytest.mark.slow
def test_as_many_layers_go_as_a_target_takes() -> None:
    whole = measures_of(None)
    for name in ("layers", "flops", "params"):
        wanted = 0.8 * whole[name]
        found = measures_of({name: int(wanted)})
        assert found[name] <= wanted
        assert 2 < found["layers"] < whole["layers"]
    reached = measures_of({"layers": int(whole["layers"])})
    assert reached == whole


def test_layers_go_until_a_target_of_time_is_reached() -> None:
    """One that no machine reaches: how fast it is, is not for a test."""
    message = r"^depth.target: speedup: 1,000.0: no more than 7 can .*; speedup is [\d.]+ then$"
    with pytest.raises(UserError, match=message):
        measures_of({"speedup": 1000.0})


def test_a_target_out_of_reach_is_refused_before_training() -> None:
    message = (
        r"^depth.target: params: 10: no more than \d+ can be taken out of this network: .*; params "
        r"is [\d,]+ then$"
    )
    with pytest.raises(UserError, match=message):
        rehearse(candidate(depth={"target": {"params": 10}}))


def test_such_a_candidate_is_not_packed_and_says_why() -> None:
    assert "set depth.when to trained" in str(packable(candidate()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"epochs": 2}}, r"closes layers over 3 epochs or more, and .* is 2; set"),
        (
            {"training": {"epochs": 3, "factory": "m:f"}},
            "closes layers in slimfront's own loop, and training.factory has one of its own",
        ),
        ({"depth": {"layers": 1, "when": "after"}}, "'training' or 'trained'"),
        ({"depth": {"layers": 1, "target": {"flops": 9}}}, "leave one of them out"),
        ({"depth": {"target": {}}}, "it names none of layers, params, flops"),
        ({"depth": {"target": {"speedup": 0.5}}}, "greater than 1"),
        (
            {"depth": {"target": {"speedup": 2}}, "latency": {"runtime": "onnx"}},
            "give the target in flops or params",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        candidate(**changes)
