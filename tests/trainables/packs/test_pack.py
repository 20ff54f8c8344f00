import io
from typing import Any

import pytest
import torch

from slimfront import Candidate
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.packs import Pack, pack_key
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.refit import Refit
from tests.trainables.packs.made import (
    CONVOLUTIONS,
    EPOCHS,
    MLP,
    assert_histories_same,
    assert_same,
    candidates,
    trained_alone,
    trained_together,
    with_target,
)

OPTIONS: list[dict[str, Any]] = [
    {
        "penalties": {"layer": {"strength": s}},
        "sparsifier": {"name": "magnitude", "sparsity": t, "every": 5},
    }
    for s, t in ((0.1, 0.5), (0.3, 0.8), (1.0, 0.9))
]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint is written and read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("model", [MLP, CONVOLUTIONS], ids=["mlp", "convolutions"])
def test_members_leave_and_others_join_in_the_middle(model: dict[str, Any]) -> None:
    first, second, third = candidates(model=model, options=OPTIONS)
    pack = Pack([first, second])
    leaver, stayer = pack.members
    histories = {member: [pack.run_epoch()[member]] for member in pack.members[:1]}
    pack.leave(leaver)
    joiner = pack.join(third)
    rest = trained_together(pack)
    while not leaver.done:
        histories[leaver].append(leaver.run_epoch())
    for member, candidate in ((leaver, first), (stayer, second), (joiner, third)):
        alone, expected = trained_alone(candidate)
        assert_same(member, alone)
        if member is not stayer:
            assert_histories_same(histories.get(member) or rest[member], expected)


def test_the_last_of_a_pack_trains_on_as_alone() -> None:
    first, second = candidates(
        2,
        options=[o | {"training": {"epochs": n}} for o, n in zip(OPTIONS[:2], (2, 4), strict=True)],
    )
    pack = Pack([first, second])
    member = pack.members[1]
    trained_together(pack)
    assert_same(member, trained_alone(second)[0])


def test_unequal_epochs_end_one_by_one() -> None:
    epochs = [2, EPOCHS, 4]
    made = candidates(
        options=[o | {"training": {"epochs": n}} for o, n in zip(OPTIONS, epochs, strict=True)]
    )
    histories = trained_together(Pack(made))
    assert [len(history) for history in histories.values()] == epochs
    for candidate, member in zip(made, histories, strict=True):
        assert_same(member, trained_alone(candidate)[0])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_checkpoint_of_a_pack_continues_alone_and_one_from_alone_in_a_pack(
    optimizer: str,
) -> None:
    made = candidates(model=CONVOLUTIONS, options=OPTIONS, optimizer=optimizer)
    pack = Pack(made)
    for _ in range(4):
        pack.run_epoch()
    states = [pack.state_dict(member) for member in pack.members]
    pack.run_epoch()  # nothing of a state changes any more
    states = [saved(state) for state in states]
    continued = Training(made[0])
    continued.load_state_dict(states[0])
    while not continued.done:
        continued.run_epoch()
    assert_same(continued, trained_alone(made[0])[0])
    other = Pack()
    alone = trained_alone(made[1], 3)[0]
    from_alone, from_pack = (
        other.join(made[1], saved(alone.state_dict())),
        other.join(made[2], states[2]),
    )
    trained_together(other)
    assert_same(from_alone, trained_alone(made[1])[0])
    assert_same(from_pack, trained_alone(made[2])[0])


def test_a_checkpoint_of_a_member_holds_nothing_of_the_others() -> None:
    pack = Pack(candidates(8))
    pack.run_epoch()
    alone = trained_alone(candidates(1)[0], 1)[0]
    sizes = []
    for state in (pack.state_dict(pack.members[0]), alone.state_dict()):
        file = io.BytesIO()
        torch.save(state, file)
        sizes.append(file.tell())
    assert sizes[0] <= 1.02 * sizes[1]


DIVERGING = [("layer", name) for name in sorted(SPARSIFIERS)] + [
    (name, "magnitude") for name in sorted(PENALTIES)
]


@pytest.mark.parametrize(("penalty", "sparsifier"), DIVERGING)
def test_one_that_diverges_fails_alone(penalty: str, sparsifier: str) -> None:
    own = {"penalties": {penalty: {"strength": 0.01}}, "sparsifier": with_target(sparsifier, 0)}
    rates = ((own | {"training": {"lr": rate}}) for rate in (0.01, 1e200, 0.002))
    made = candidates(
        model=CONVOLUTIONS, options=list(rates), epochs=3 if sparsifier == "lottery" else 2
    )
    histories = list(trained_together(Pack(made)).items())
    failure = histories[1][1][-1]
    assert isinstance(failure, TrialFailure)
    assert "diverged: the training loss is" in str(failure)
    with pytest.raises(TrialFailure):
        trained_alone(made[1])
    for number in (0, 2):
        alone, expected = trained_alone(made[number])
        member, history = histories[number]
        assert_histories_same(history, expected)
        assert_same(member, alone)


def test_a_member_is_finished_as_alone_and_trains_on() -> None:
    options = [o | {"refit": {"epochs": 1}, "one_shot": {"steps": 1, "keep": 0.9}} for o in OPTIONS]
    made = candidates(model=CONVOLUTIONS, options=options)
    pack = Pack(made)
    members = list(pack.members)
    for _ in range(3):
        pack.run_epoch()
    early = pack.finish(members[1], Refit(), one_shot=False)
    alone = trained_alone(made[1], 3)[0]
    assert_histories_same([early.measures], [alone.finish(Refit(), one_shot=False).measures])
    trained_together(pack)
    alone = trained_alone(made[1])[0]
    assert_same(members[1], alone)
    finished, expected = members[1].finish(), alone.finish()
    assert_histories_same(
        [finished.measures, *finished.history], [expected.measures, *expected.history]
    )
    assert [p.measures["params"] for p in finished.pruned] == [
        p.measures["params"] for p in expected.pruned
    ]


def test_augmentation_is_drawn_by_each_member_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "name": "factory",
        "factory": "tests.trainables.data.made:image_tensors",
        "augment": {"crop": 2, "flip": True},
    }
    monkeypatch.undo()  # the data as they are, in float32
    torch.set_default_dtype(torch.float32)
    made = candidates(options=[{"data": data}] * 3, epochs=2)
    for candidate, (member, history) in zip(
        made, trained_together(Pack(made)).items(), strict=True
    ):
        alone, expected = trained_alone(candidate)
        assert_same(member, alone)
        assert history[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-5)
        assert torch.equal(member.augmenter.get_state(), alone.augmenter.get_state())


def test_a_closed_pack_leaves_no_hooks_and_an_empty_one_trains_nothing() -> None:
    pack = Pack(candidates(options=[{"penalties": {"cka": {"strength": 0.1}}}] * 3))
    members = list(pack.members)
    pack.run_epoch()
    pack.close()
    assert not any(module._forward_hooks for member in members for module in member.model.modules())
    assert pack.run_epoch() == {}


DIFFERENT: dict[str, dict[str, Any]] = {
    "model": {"model": {"name": "mlp", "depth": 2}},
    "data": {"data": {"name": "digits", "seed": 1}},
    "training.batch_size": {"training": {"batch_size": 8}},
    "penalties": {"penalties": {"node": {"strength": 1.0}}},
}
COMPARED = {"aug_cka": {"strength": 1.0, "layers": ["2", "4"]}}


@pytest.mark.parametrize("what", sorted(DIFFERENT))
def test_candidates_that_differ_in_more_than_numbers_are_refused(what: str) -> None:
    first, second = candidates(2, options=[{}, DIFFERENT[what]])
    assert pack_key(first) != pack_key(second)
    with pytest.raises(
        UserError, match=rf"these differ in {what}; fix what differs, or set resources.pack to 1"
    ):
        Pack([first, second])


def test_layers_that_are_compared_are_not_strengths() -> None:
    first, second = candidates(
        2, options=[{"penalties": {"aug_cka": {"strength": 1.0}}}, {"penalties": COMPARED}]
    )
    assert pack_key(first) != pack_key(second)


def test_candidates_that_differ_in_numbers_alone_have_one_key() -> None:
    own = [
        OPTIONS[0],
        OPTIONS[1]
        | {"training": {"optimizer": "sgd", "momentum": 0.1, "epochs": 3, "schedule": "cosine"}},
    ]
    first, second = candidates(2, options=own)
    assert pack_key(first) == pack_key(second)
    assert isinstance(first, Candidate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_pack_on_a_gpu_is_as_alone_there(optimizer: str) -> None:
    made = candidates(model=CONVOLUTIONS, options=OPTIONS, optimizer=optimizer)
    for candidate, member in zip(made, trained_together(Pack(made, "cuda")), strict=True):
        alone = Training(candidate, "cuda")
        while not alone.done:
            alone.run_epoch()
        assert_same(member, alone)
