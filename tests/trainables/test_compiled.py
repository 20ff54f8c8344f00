"""torch.compile changes how long a step takes, and nothing else: in float64, where rounding does
not decide."""

import logging
import os
import shutil
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from slimfront import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs import Pack, packable
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.acceleration import compiled
from slimfront.trainables.training.loop import Training
from tests.trainables.packs.conftest import doubles  # noqa: F401 (float64, on few examples)
from tests.trainables.packs.made import (
    CONVOLUTIONS,
    FORMS,
    assert_histories_same,
    assert_same,
    candidates,
    trained_alone,
    with_target,
)

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler here"
)

DROPPING = {"factory": "tests.trainables.test_compiled:dropping"}


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 10)
    )


class Alone(nn.Sequential):
    """A class that no other test compiles."""


def other() -> nn.Module:
    return Alone(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 10))


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_found", {})
    monkeypatch.setattr(compiled, "_plain", {})


def made(compile_: bool | str, model: dict[str, Any] = CONVOLUTIONS, **options: Any) -> Candidate:
    return candidates(1, model=model, options=[options], epochs=3, compile=compile_)[0]


def check_same(**options: Any) -> None:
    """Trains without and with, and compares all that a checkpoint holds and the compact
    networks."""
    (one, history), (fast, its_history) = (
        trained_alone(made(False, **options)),
        trained_alone(made(True, **options)),
    )
    assert (one.losses.compiled, one.compiles, fast.compiles) == (None, False, True)  # type: ignore[union-attr]
    assert_histories_same(history, its_history)
    one.compiles = True  # the one thing that differs
    assert_same(one, fast)
    finished, its_own = one.finish(), fast.finish()
    assert_histories_same([finished.measures], [its_own.measures])


# To compile the encoders of AugCKA-SR takes as long as all others; CKA-SR has the same penalty.
SOON = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "aug_cka" else ()) for pair in FORMS
]


@pytest.mark.parametrize(("name", "form"), SOON)
def test_training_with_a_penalty_is_the_same_compiled(name: str, form: str | None) -> None:
    strength = {"cka": 0.01, "aug_cka": 0.01, "connection": 1e-3}.get(name, 0.05)
    check_same(
        penalties={name: {"strength": strength} | ({"form": form} if form else {"every": 2})}
    )


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_training_with_a_sparsifier_is_the_same_compiled(name: str) -> None:
    check_same(sparsifier=with_target(name, 1))


def test_dropout_drops_the_same_compiled() -> None:
    check_same(model=DROPPING)


def test_channels_may_be_last() -> None:
    check_same(training={"channels_last": True})


def test_one_code_serves_all_trainings_of_an_architecture_and_full_batches_alone_run_it() -> None:
    penalties = {"cka": {"strength": 0.01, "every": 2}}
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    for options in (
        {},
        {"penalties": penalties},
        {"sparsifier": with_target("rigl", 1)},
        {"training": {"seed": 8, "lr": 0.1}},
    ):
        trained_alone(made(True, **options), epochs=1)
    assert counters["stats"]["unique_graphs"] == before + 1


def seen_by(sizes: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        sizes.append(len(outputs))

    return hook


def test_hooks_of_the_users_own_run_on_their_own_network() -> None:
    seen: list[list[int]] = [[], []]
    for mine in seen:
        training = Training(made(True))
        training.model[0].register_forward_hook(seen_by(mine))  # type: ignore[index]
        training.run_epoch()
    assert seen[0] == seen[1] == [16] * 4 + [10] + [40]  # batches, the smaller one, validation


def test_a_training_goes_on_bit_exactly_as_it_was() -> None:
    candidate = made(True, penalties={"layer": {"strength": 0.05}})
    whole, _ = trained_alone(candidate)
    half, _ = trained_alone(candidate, epochs=1)
    resumed = Training(candidate)
    resumed.load_state_dict(half.state_dict())
    while not resumed.done:
        resumed.run_epoch()
    for one, two in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, two)


def auto_with(monkeypatch: pytest.MonkeyPatch, plain: float, fast: float) -> None:
    """`auto` finds that a step takes so long; the first look is at the network as it is."""
    times = cycle([plain, fast])
    first = iter([plain])
    monkeypatch.setattr(
        compiled, "seconds_of", lambda take, device: next(first, None) or next(times)
    )


@pytest.mark.parametrize(
    ("plain", "fast", "compiles"),
    [(60.0, 30.0, True), (60.0, 59.0, False), (60.0, 90.0, False), (1.0, 0.1, False)],
    ids=["faster", "hardly", "slower", "short"],
)
def test_auto_compiles_long_trainings_that_it_makes_faster(
    monkeypatch: pytest.MonkeyPatch, plain: float, fast: float, compiles: bool
) -> None:
    auto_with(monkeypatch, plain, fast)
    training, _ = trained_alone(made("auto"), epochs=1)
    assert training.compiles == compiles
    assert training.state_dict()["compiles"] == compiles


def test_auto_measures_on_a_copy_and_once_for_an_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "LONG_S", 0.0)
    monkeypatch.setattr(compiled, "_GAIN", 1e9)
    plain, history = trained_alone(made(False), epochs=1)
    training, its_history = trained_alone(made("auto"), epochs=1)
    assert history == its_history
    assert all(
        torch.equal(*pair)
        for pair in zip(plain.model.buffers(), training.model.buffers(), strict=True)
    )
    assert training.compiles is False
    monkeypatch.setattr(compiled, "seconds_of", None)  # would fail
    assert trained_alone(made("auto"), epochs=1)[0].compiles is False


def test_auto_measures_short_trainings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained_alone(made("auto"), epochs=1)[0].compiles is False
    monkeypatch.setattr(compiled, "seconds_of", None)  # would fail
    assert trained_alone(made("auto"), epochs=1)[0].compiles is False


def test_auto_goes_on_as_it_was_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    auto_with(monkeypatch, 60.0, 30.0)
    half, _ = trained_alone(made("auto"), epochs=1)
    monkeypatch.setattr(compiled, "seconds_of", None)  # would fail
    resumed = Training(made("auto"))
    resumed.load_state_dict(half.state_dict())
    resumed.run_epoch()
    assert resumed.losses.compiled is not None  # type: ignore[union-attr]


def test_without_a_compiler_it_says_so_and_auto_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    network = {"factory": "tests.trainables.test_compiled:other"}
    with pytest.raises(
        UserError, match=r"No working C\+\+ compiler.*; set training.compile to false"
    ):
        Training(made(True, network)).run_epoch()
    monkeypatch.setattr(compiled, "LONG_S", 0.0)
    with caplog.at_level(logging.WARNING):
        training, _ = trained_alone(made("auto", network), epochs=1)
    assert training.compiles is False
    assert "No working C++ compiler" in caplog.text


def test_packs_are_not_compiled() -> None:
    assert packable(made("auto")) is None
    reason = packable(made(True))
    assert reason is not None and "training.compile: true cannot be in a pack" in reason
    with pytest.raises(UserError, match="set it to auto or false"):
        Pack([made(True)])
