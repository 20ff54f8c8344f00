"""Recorded steps give what steps give that are taken one by one; the stand-in for CUDA graphs needs
no GPU."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs import Pack
from slimfront.trainables.packs.streams import can_stream
from slimfront.trainables.training.acceleration.step_graphs import (
    WARM_UP,
    StepGraphs,
    step_graphs,
    why_not,
    why_not_anywhere,
)
from slimfront.trainables.training.loop import Training
from tests.trainables.recorded import record

SGD = {"optimizer": "sgd", "lr": 0.05, "schedule": "cosine", "weight_decay": 5e-4}
TRAINING: dict[str, Any] = {"epochs": 3, "batch_size": 64, "seed": 3}
RESNET = {"name": "resnet20", "depth": 8, "width": 4}
IMAGES = {
    "name": "factory",
    "factory": "tests.trainables.test_step_graphs:images",
    "augment": {"crop": 2, "flip": True},
}

CASES: dict[str, dict[str, Any]] = {
    "adam": {"training": {"optimizer": "adam", "lr": 0.01}},
    "adamw, cosine": {
        "training": {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine", "weight_decay": 0.01}
    },
    "sgd": {"training": SGD},
    "sgd without momentum": {"training": SGD | {"momentum": 0.0}},
    "layer": {"penalties": {"layer": {"strength": 0.5}}, "training": SGD},
    "layer, gradient": {"penalties": {"layer": {"strength": 0.5, "form": "gradient"}}},
    "node": {"penalties": {"node": {"strength": 0.05}}},
    "connection": {"penalties": {"connection": {"strength": 0.01}}, "training": SGD},
    "channel": {"penalties": {"channel": {"strength": 0.05}}},
    "cka": {"penalties": {"cka": {"strength": 0.1, "every": 2}}},
    "aug_cka, with warm-up": {"penalties": {"aug_cka": {"strength": 0.1, "every": 3, "warmup": 1}}},
    "a ramp": {"penalties": {"layer": {"strength": 0.5, "ramp": 1}}},
    "random": {"sparsifier": {"name": "random", "sparsity": 0.8}, "training": SGD},
    "magnitude": {"sparsifier": {"name": "magnitude", "sparsity": 0.8, "every": 5}},
    "rigl": {"sparsifier": {"name": "rigl", "sparsity": 0.8, "every": 7}, "training": SGD},
    "lottery": {"sparsifier": {"name": "lottery", "sparsity": 0.8, "rounds": 2}},
    "channels": {"sparsifier": {"name": "channels", "sparsity": 0.5, "every": 5}},
    "images": {
        "data": IMAGES,
        "model": RESNET,
        "training": SGD,
        "penalties": {"cka": {"strength": 0.1, "every": 2}},
    },
    "bf16, channels last": {
        "data": IMAGES,
        "model": RESNET,
        "training": SGD | {"precision": "bf16", "channels_last": True},
        "sparsifier": {"name": "random", "sparsity": 0.5},
    },
}


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    return (
        torch.rand(400, 1, 8, 8, generator=generator) * 100 + 30 * labels[:, None, None, None]
    ).to(torch.uint8), labels


def candidate(**case: Any) -> Candidate:
    tree = {"model": {"name": "mlp", "depth": 3, "width": 16}} | case
    return Candidate.model_validate(tree | {"training": TRAINING | case.get("training", {})})


def recorded(**case: Any) -> Training:
    """A training on a CPU whose steps are recorded by the stand-in."""
    training = Training(candidate(**case))
    training.graphs = StepGraphs(training, record)
    return training


def run(training: Training, epochs: int) -> list[dict[str, Any]]:
    return [training.run_epoch() for _ in range(epochs)]


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]], rel: float) -> None:
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_give_what_steps_taken_one_by_one_give(name: str) -> None:
    case = CASES[name]
    plain, fast = Training(candidate(**case)), recorded(**case)
    assert_same(run(fast, 3), run(plain, 3), rel=1e-2 if "bf16" in name else 2e-4)
    assert fast.graphs is not None
    assert fast.graphs.replays > 0
    assert fast.graphs.refusal is None
    loose = {"rtol": 1e-3, "atol": 1e-5} if "bf16" not in name else {"rtol": 0.1, "atol": 1e-2}
    for one, other in zip(fast.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, **loose)
    assert fast.counts().tolist() == pytest.approx(plain.counts().tolist(), rel=0.02, abs=2)


def test_a_replay_gives_bit_by_bit_what_its_step_gives() -> None:
    case = CASES["images"]
    slow, fast = recorded(**case), recorded(**case)
    assert slow.graphs is not None
    slow.graphs._ready = lambda phase: False  # type: ignore[method-assign]
    assert run(slow, 3) == run(fast, 3)
    assert slow.graphs.replays == 0
    assert fast.graphs is not None
    assert fast.graphs.replays > 0
    assert all(map(torch.equal, fast.model.state_dict().values(), slow.model.state_dict().values()))


def test_a_resumed_training_goes_on_bit_by_bit() -> None:
    case = CASES["images"]
    whole, first, second = recorded(**case), recorded(**case), recorded(**case)
    expected = run(whole, 3)
    assert run(first, 1) == expected[:1]
    second.load_state_dict(first.state_dict())
    assert run(second, 2) == expected[1:]


def test_one_phase_is_recorded_for_batches_that_cka_sees_and_one_for_others() -> None:
    training = recorded(penalties={"cka": {"strength": 0.1, "every": 2}})
    run(training, 1)
    assert training.graphs is not None
    assert len(training.graphs.recorded) == 2
    steps = training.steps_per_epoch()
    assert training.graphs.replays == steps - 2 * WARM_UP - 1  # the last batch is smaller


def test_a_strength_that_rises_is_not_recorded_before_it_stays() -> None:
    training = recorded(penalties={"layer": {"strength": 0.5, "ramp": 2}})
    run(training, 2)
    assert training.graphs is not None
    assert training.graphs.replays == 0
    run(training, 1)
    assert training.graphs.replays > 0


def test_recordings_of_tensors_that_are_no_longer_used_are_dropped() -> None:
    training = recorded(training=SGD)
    run(training, 1)
    assert training.graphs is not None
    assert training.graphs.recorded
    for parameter in training.model.parameters():
        parameter.data = parameter.data.clone()
    training.graphs.check_addresses()
    assert not training.graphs.recorded
    plain = Training(candidate(training=SGD))
    assert_same(run(training, 2), run(plain, 3)[1:], rel=2e-4)


class Reads(nn.Module):
    """A network that asks for a number in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + 0.0 * float(x.detach().mean())
        made: Tensor = scale * self.layers(x)
        return made


class Draws(Reads):
    """A network that drops paths at random, by Python's own numbers."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x) * (1.0 if random.random() > 0.1 else 0.0)
        return made


class Counts(Reads):
    """A network that counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        made: Tensor = self.layers(x) / self.batches
        return made


class Drops(Reads):
    """A network with a dropout that is not a module."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(nn.functional.dropout(x, 0.1, self.training))
        return made


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Reads, "not permitted"), (Draws, "random"), (Counts, "counts"), (Drops, "random")],
)
def test_a_network_that_a_replay_would_not_repeat_is_trained_as_ever(
    kind: type[nn.Module], reason: str
) -> None:
    case = {
        "model": {
            "name": "factory",
            "factory": f"tests.trainables.test_step_graphs:{kind.__name__}",
        }
    }
    plain, training = Training(candidate(**case)), recorded(**case)
    random.seed(0)
    expected = run(plain, 2)
    random.seed(0)
    assert_same(run(training, 2), expected, rel=2e-4)
    assert training.graphs is not None
    assert training.graphs.refusal is not None
    assert reason in training.graphs.refusal
    assert training.graphs.replays == 0


def test_such_a_network_is_an_error_where_recording_is_asked_for() -> None:
    case = {"model": {"name": "factory", "factory": "tests.trainables.test_step_graphs:Reads"}}
    training = recorded(**case)
    training.options = training.options.model_copy(update={"cuda_graphs": True})
    with pytest.raises(
        UserError,
        match=(
            r"training\.cuda_graphs: true: steps of this network cannot be recorded "
            r".*set it to auto"
        ),
    ):
        training.run_epoch()


def test_a_step_that_runs_out_of_memory_while_it_is_recorded_is_taken_as_ever() -> None:
    def short(take: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    training = Training(candidate(training=SGD))
    training.graphs = StepGraphs(training, short)
    assert_same(run(training, 2), run(Training(candidate(training=SGD)), 2), rel=2e-4)
    assert training.graphs.refusal is not None
    assert "out of memory" in training.graphs.refusal


def test_what_cannot_be_recorded_is_said() -> None:
    training = Training(candidate())
    assert why_not(training) == "it needs a GPU"
    assert why_not_anywhere(training) is None
    assert training.graphs is None
    dropping = Training(
        candidate(model={"name": "factory", "factory": "tests.trainables.test_step_graphs:dropout"})
    )
    assert why_not_anywhere(dropping) == "the network drops at random"
    halving = Training(candidate(training={"out_of_memory": "halve"}))
    assert why_not_anywhere(halving) == "training.out_of_memory is halve"
    with pytest.raises(
        UserError, match=r"training\.cuda_graphs: true: .*it needs a GPU; set it to auto or false"
    ):
        Training(candidate(training={"cuda_graphs": True}))
    assert step_graphs(training) is None


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))


def test_members_of_a_pack_on_streams_train_as_they_do_alone_bit_by_bit() -> None:
    cases = [
        CASES["random"]
        | {"training": SGD | {"seed": seed, "lr": 0.05 / (1 + seed), "epochs": 2 + seed % 2}}
        for seed in range(3)
    ]
    pack = Pack([recorded(**case) for case in cases])
    members = list(pack.members)
    assert can_stream(members)
    histories: dict[Training, list[dict[str, Any]]] = {member: [] for member in members}
    while pack.members:
        for member, metrics in pack.run_epoch().items():
            assert isinstance(metrics, dict)
            histories[member].append(metrics)
    assert pack.stack is None
    for member, case in zip(members, cases, strict=True):
        alone = recorded(**case)
        assert histories[member] == run(alone, alone.options.epochs)


def test_a_member_that_diverges_leaves_a_pack_on_streams_and_the_others_go_on() -> None:
    good, bad = (recorded(training=SGD | {"lr": lr}) for lr in (0.05, 1e30))
    pack = Pack([good, bad])
    results = pack.run_epoch()
    assert "diverged" in str(results[bad])
    assert pack.members == [good]
    assert results[good] == recorded(training=SGD).run_epoch()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_recorded_steps_give_what_steps_taken_one_by_one_give(name: str) -> None:
    case = CASES[name]
    plain = Training(
        candidate(**case | {"training": case.get("training", {}) | {"cuda_graphs": False}}), "cuda"
    )
    fast = Training(candidate(**case), "cuda")
    assert_same(run(fast, 3), run(plain, 3), rel=0.2 if "bf16" in name else 0.05)
    assert fast.graphs is not None
    assert fast.graphs.refusal is None
    assert fast.graphs.replays > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_members_of_a_pack_train_beside_each_other_as_they_do_alone() -> None:
    case = CASES["images"] | {"penalties": {}, "sparsifier": {"name": "random", "sparsity": 0.8}}
    pack = Pack(
        [candidate(**case | {"training": SGD | {"seed": seed}}) for seed in range(4)], "cuda"
    )
    members = list(pack.members)
    results = [pack.run_epoch(), pack.run_epoch()]
    for seed, member in enumerate(members):
        alone = Training(candidate(**case | {"training": SGD | {"seed": seed}}), "cuda")
        for epoch in results:
            assert epoch[member] == pytest.approx(alone.run_epoch(), rel=0.05, abs=0.02)
        assert member.graphs is not None
        assert member.graphs.replays > 0
