"""Trainings on two processes: what they hold is the same on both, bit by bit, and the same as on
one, but for rounding."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimfront import Candidate
from slimfront.trainables.distributed.team import LedTraining, LostProcess, Team
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.ranks import LEAST_SHARE
from tests.trainables.packs.made import FORMS
from tests.trainables.tasks.made import JOBS

MADE = "tests.trainables.distributed.made"
EPOCHS = 3
NOISY: dict[str, Any] = {
    "model": {"factory": f"{MADE}:noisy"},
    "data": {
        "name": "factory",
        "factory": "tests.trainables.data.made:image_tensors",
        "args": {"count": 300},
        "augment": {"crop": 2, "flip": True},
    },
    "training": {"epochs": 4, "batch_size": 50, "lr": 0.01, "seed": 3},
}
SPARSE = {
    name: {"name": name}
    | ({"every": 2} if "every" in options.model_fields else {})
    | ({} if name == "nm" else {"sparsity": 0.6})
    for name, options in SPARSIFIERS.items()
}


def candidate(**changes: Any) -> Candidate:
    """1,078 examples in batches of 199, which two ranks cannot share equally."""
    tree: dict[str, Any] = {
        "model": {"factory": f"{MADE}:Doubled"},
        "training": {
            "epochs": EPOCHS,
            "batch_size": 199,
            "lr": 0.05,
            "seed": 7,
            "optimizer": "sgd",
        },
        "one_shot": {"steps": 0},
    }
    return Candidate.model_validate(tree | changes)


def penalties(name: str, form: str | None = "proximal") -> dict[str, Any]:
    return {name: {"strength": 0.01} | ({"form": form} if form else {"every": 2})}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Processes that all tests here reuse, as trials do; those that lose one leave the next test
    new ones."""
    with Team(2, timeout_s=60) as team:
        yield team


def led(team: Team, candidate: Candidate) -> LedTraining:
    training = team.training(candidate)
    assert isinstance(training, LedTraining)
    return training


def leaves(state: Any) -> list[Any]:
    """All tensors and values of a state, in order."""
    if isinstance(state, dict):
        return [leaf for key in sorted(state, key=str) for leaf in leaves(state[key])]
    return (
        [leaf for item in state for leaf in leaves(item)]
        if isinstance(state, (list, tuple))
        else [state]
    )


def same(first: Any, second: Any) -> bool:
    pairs = list(zip(leaves(first), leaves(second), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


SHARED = ("epoch", "step", "parts", "model", "optimizer", "sparsifier", "shuffler")


def check_ranks(training: LedTraining) -> None:
    first, *others = ({key: state[key] for key in SHARED} for state in training.states())
    assert first["optimizer"]["state"]
    assert others
    for other in others:
        for key in SHARED:
            assert same(first[key], other[key]), key


def check_close(training: Training, alone: Training) -> None:
    """Equal but for rounding, and masks exactly."""
    for a, b in zip(
        training.model.state_dict().values(), alone.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    if training.sparsifier is not None:
        assert alone.sparsifier is not None
        assert same(training.sparsifier.masks, alone.sparsifier.masks)


def run(training: Training, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    return [training.run_epoch() for _ in range(epochs)]


def check_as_alone(team: Team, candidate: Candidate, parts: int = 1) -> None:
    training, alone = led(team, candidate), Training(candidate)
    alone.parts = parts
    for together, single in zip(run(training), run(alone), strict=True):
        assert together == pytest.approx(single, rel=1e-6)
    check_ranks(training)
    check_close(training, alone)
    alone.close()
    training.close()


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_every_sparsifier_has_the_masks_of_a_single_process_on_all_ranks(
    team: Team, name: str
) -> None:
    check_as_alone(team, candidate(sparsifier=SPARSE[name], penalties=penalties("layer")))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_penalty_acts_as_on_a_single_process(team: Team, name: str, form: str | None) -> None:
    # CKA-SR looks at the parts of a batch that ranks take: as in a single process that takes a
    # batch in two parts.
    chosen = candidate(sparsifier=SPARSE["rigl"], penalties=penalties(name, form))
    check_as_alone(team, chosen, parts=1 if form else 2)


def test_distillation_is_as_on_a_single_process(team: Team, tmp_path: Path) -> None:
    teacher = Training(candidate())
    teacher.run_epoch()
    torch.save(teacher.model.state_dict(), tmp_path / "teacher.pt")
    distill = {"teacher": str(tmp_path / "teacher.pt"), "weight": 0.7}
    check_as_alone(team, candidate(distill=distill, penalties=penalties("layer")))


def test_layers_close_as_on_a_single_process(team: Team) -> None:
    check_as_alone(team, candidate(depth={"layers": 2}, penalties=penalties("node")))


@pytest.mark.parametrize("name", [None, *sorted(SPARSIFIERS)])
def test_ranks_stay_the_same_through_batch_norms_dropout_and_augmentation(
    team: Team, name: str | None
) -> None:
    both = penalties("node") | penalties("aug_cka", None)
    training = led(
        team, candidate(**NOISY, sparsifier=SPARSE[name] if name else None, penalties=both)
    )
    history = run(training, 4)
    check_ranks(training)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    noise = [state["noise"]["cpu"] for state in training.states()]
    assert not torch.equal(*noise)  # each rank drops out other units
    # Compacted by rank 0 alone, which must not wait for the others.
    measures = training.finish().measures
    assert measures["val_accuracy"] == history[-1]["val_accuracy"]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_last_batch_too_small_to_share_and_an_unused_layer_change_nothing(
    team: Team, optimizer: str
) -> None:
    # 3 of 359, and 1.
    training = {
        "epochs": EPOCHS,
        "batch_size": 359,
        "lr": 0.01,
        "seed": 7,
        "optimizer": optimizer,
    }
    check_as_alone(team, candidate(model={"factory": f"{MADE}:LeavesOut"}, training=training))


@pytest.mark.parametrize("name", ["rigl", "lottery"])
def test_a_training_of_two_processes_continues_bit_exactly(
    team: Team, name: str, tmp_path: Path
) -> None:
    sparsifier = SPARSE[name] | ({"rewind": 0.5} if name == "lottery" else {})
    options = candidate(**NOISY, sparsifier=sparsifier, penalties=penalties("cka", None))
    whole = led(team, options)
    history, expected = run(whole, 4), whole.state_dict()
    first = led(team, options)
    run(first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = led(team, options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(second, 2) == history[2:]
    assert same(second.state_dict(), expected)
    check_ranks(second)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_a_training_continues_on_another_number_of_processes(
    team: Team, ranks: tuple[int, int]
) -> None:
    options = candidate(sparsifier=SPARSE["set"], penalties=penalties("node"))
    alone = Training(options)
    run(alone)
    first, second = (led(team, options) if size == 2 else Training(options) for size in ranks)
    run(first, 1)
    second.load_state_dict(first.state_dict())
    run(second, EPOCHS - 1)
    check_close(second, alone)


def test_a_share_of_a_batch_is_enough_for_every_penalty() -> None:
    assert max(cls.least_batch for cls in PENALTIES.values()) <= LEAST_SHARE


def test_masks_are_those_of_rank_0_where_ranks_do_not_compute_the_same(team: Team) -> None:
    training = led(
        team, candidate(model={"factory": f"{MADE}:Drifting"}, sparsifier=SPARSE["snip"])
    )
    run(training)
    check_ranks(training)


def test_refit_on_rank_0_does_not_put_the_ranks_out_of_step(team: Team) -> None:
    training = led(team, candidate(refit={"epochs": 1, "when": "reports"}))
    run(training, 1)
    assert training.finish().measures["recovery_epochs"] == 1
    run(training, 2)
    check_ranks(training)


def test_all_ranks_take_smaller_parts_where_one_is_short_of_memory(team: Team) -> None:
    options = {
        "epochs": 2,
        "batch_size": 128,
        "lr": 0.05,
        "seed": 1,
        "optimizer": "sgd",
        "out_of_memory": "halve",
    }
    model = {"factory": f"{MADE}:Troubled", "args": {"trouble": "memory", "rank": 1}}
    training = led(team, candidate(model=model, training=options))
    alone = Training(candidate(training=options))
    assert run(training, 2)[-1]["train_loss"] == pytest.approx(
        run(alone, 2)[-1]["train_loss"], rel=1e-6
    )
    # 64 of a batch each, in parts of 32.
    assert [state["parts"] for state in training.states()] == [
        2,
        2,
    ]
    check_ranks(training)
    check_close(training, alone)


def test_a_loss_that_diverges_fails_the_trial_and_the_processes_take_the_next(team: Team) -> None:
    before = [child.pid for child in team.children.values()]
    diverging = led(team, candidate(training={"epochs": 1, "lr": 1e200, "seed": 0}))
    with pytest.raises(TrialFailure, match=r"diverged: the training loss is (inf|nan) in epoch 1"):
        diverging.run_epoch()
    with pytest.raises(UserError, match="is not a layer that LayerSparsity acts on"):
        team.training(candidate(penalties={"layer": {"layers": {"nowhere": 1.0}}}))
    assert run(led(team, candidate()), 1)[0]["train_loss"] < math.inf
    assert before == [child.pid for child in team.children.values()]


@pytest.mark.parametrize(
    ("trouble", "rank", "error", "message"),
    [
        pytest.param(
            "memory",
            1,
            LostProcess,
            "process 1 of the 2 of a training is lost: OutOfMemoryError: out of memory",
            marks=pytest.mark.slow,
        ),
        (
            "killed",
            1,
            LostProcess,
            "process 1 of the 2 of a training is lost: it was ended by SIGKILL",
        ),
        pytest.param("raises", 0, ValueError, "the network is moody", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_lost_is_named_and_the_next_training_gets_new_ones(
    team: Team, trouble: str, rank: int, error: type[Exception], message: str
) -> None:
    training = led(
        team,
        candidate(
            model={"factory": f"{MADE}:Troubled", "args": {"trouble": trouble, "rank": rank}}
        ),
    )
    before = list(team.children.values())
    with pytest.raises(error, match=message):
        training.run_epoch()
    assert all(child.poll() is not None for child in before)  # none is left
    healthy = led(team, candidate())
    run(healthy, 1)
    check_ranks(healthy)


def test_ranks_stay_the_same_in_bf16_and_with_channels_last(team: Team) -> None:
    changes = NOISY | {"training": NOISY["training"] | {"precision": "bf16", "channels_last": True}}
    training = led(team, candidate(**changes, penalties=penalties("cka", None)))
    history = run(training, 4)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert {parameter.dtype for parameter in training.parameters} == {torch.float32}
    check_ranks(training)
    plain = led(team, candidate(**NOISY, penalties=penalties("cka", None)))
    first = plain.run_epoch()
    assert history[0]["train_loss"] != first["train_loss"]
    assert history[0]["train_loss"] == pytest.approx(first["train_loss"], rel=0.1)


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=pytest.mark.slow), "auto"])
def test_ranks_stay_the_same_compiled(team: Team, compiles: bool | str) -> None:
    changes = NOISY | {"training": NOISY["training"] | {"compile": compiles}}
    training = led(team, candidate(**changes, penalties=penalties("cka", None)))
    history = run(training, 4)
    assert training.compiles == (compiles is True)  # auto: too short
    check_ranks(training)
    plain = run(led(team, candidate(**NOISY, penalties=penalties("cka", None))), 4)
    for one, other in zip(history, plain, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def test_a_second_team_in_a_process_is_refused(team: Team) -> None:
    training = led(team, candidate())
    with pytest.raises(UserError, match="another team's; close that first"), Team(2) as second:
        second.training(candidate())
    training.run_epoch()


def test_a_process_that_hangs_is_given_up(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    team.close()
    monkeypatch.setattr(team, "timeout_s", 5)
    monkeypatch.setattr("slimfront.trainables.distributed.team._GRACE_S", 0.5)
    training = led(team, candidate())
    (child,) = team.children.values()
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(
        LostProcess, match="one of the 2 processes of a training did not answer for 5 s"
    ):
        training.run_epoch()
    assert child.poll() is not None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_ranks_stay_the_same_on_gpus(name: str) -> None:
    with Team(2, "cuda", timeout_s=60) as team:
        training = led(
            team,
            candidate(
                **NOISY,
                sparsifier=SPARSE[name],
                penalties=penalties("node") | penalties("cka", None),
            ),
        )
        assert training.device == torch.device("cuda", 0)
        history = run(training, 4)
        assert history[-1]["train_loss"] < history[0]["train_loss"]
        check_ranks(training)


@pytest.mark.parametrize("job", JOBS)
def test_every_task_on_two_processes_has_the_metrics_of_one(job: str, team: Team) -> None:
    tree = {**JOBS[job], "training": {"epochs": 2, "batch_size": 32, "lr": 0.01, "seed": 1}}
    made = Candidate.model_validate(tree)
    alone, shared = Training(made), team.training(made)
    wanted = [alone.run_epoch() for _ in range(2)]
    found = [shared.run_epoch() for _ in range(2)]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-2, abs=2e-3)
    shared.close()
    alone.close()
