from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from search.samplers import SAMPLERS
from search.searcher import InvalidCandidate, StudySearcher

GOOD = {"a": 1.0, "b": 2.0}


def searcher(sampler: str = "random", seed: int = 0, trials: int = 3) -> StudySearcher:
    study = optuna.create_study(sampler=SAMPLERS[sampler](seed), directions=["maximize", "minimize"])
    space: dict[str, Any] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(1e-3, 1, log=True)}
    return StudySearcher(study, space, ["a", "b"], lambda number, values: {"number": number, "values": values}, trials)


def suggested(s: StudySearcher, trial_id: str) -> dict[str, Any]:
    config = s.suggest(trial_id)
    assert isinstance(config, dict)
    return config


def test_the_dense_reference_comes_first_and_is_never_told() -> None:
    s = searcher()
    assert suggested(s, "ray0") == {"number": None, "values": None}
    s.on_trial_complete("ray0", GOOD)
    assert s.study.trials == []


def test_as_many_trials_as_asked_for_then_finished() -> None:
    s = searcher(trials=2)
    numbers = [suggested(s, str(i))["number"] for i in range(3)]
    assert numbers == [None, 0, 1]
    assert s.suggest("3") == StudySearcher.FINISHED


@pytest.mark.parametrize(
    ("result", "error", "reason"),
    [
        ({"a": float("nan"), "b": 1.0}, False, "not finite"),
        ({"a": float("inf"), "b": 1.0}, False, "not finite"),
        ({"a": 1.0}, False, "missing"),
        ({"failure": "diverged in epoch 3"}, False, "diverged in epoch 3"),
        (None, True, "raised"),
        (GOOD, True, "raised"),
    ],
)
def test_a_trial_without_usable_objectives_is_told_as_failed_with_its_reason(
    result: dict[str, Any] | None, error: bool, reason: str
) -> None:
    s = searcher()
    s.suggest("dense")
    s.suggest("one")
    s.on_trial_complete("one", result, error=error)
    assert s.study.trials[0].state == TrialState.FAIL
    assert reason in s.study.trials[0].user_attrs["failure"]


def test_a_completed_trial_is_told_with_its_values() -> None:
    s = searcher()
    s.suggest("dense")
    s.suggest("one")
    s.on_trial_complete("one", GOOD)
    assert s.study.trials[0].values == [1.0, 2.0]


def test_an_interrupted_search_leaves_no_trial_running() -> None:
    s = searcher()
    for i in range(3):
        s.suggest(str(i))
    s.close()
    assert [t.state for t in s.study.trials] == [TrialState.FAIL] * 2


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_takes_several_objectives_and_repeats_itself_with_the_same_seed(sampler: str) -> None:
    def run(seed: int) -> list[dict[str, Any]]:
        s = searcher(sampler, seed, trials=14)
        s.suggest("dense")
        values = []
        for i in range(14):
            values.append(suggested(s, str(i))["values"])
            s.on_trial_complete(str(i), {"a": values[-1]["x"], "b": values[-1]["x"] ** 2 + values[-1]["y"]})
        return values

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_values_that_make_no_candidate_fail_their_trial_and_the_next_one_is_asked_for() -> None:
    rejected: list[tuple[int, str]] = []

    def make(number: int | None, values: dict[str, Any] | None) -> dict[str, Any]:
        if number in (0, 2):
            raise InvalidCandidate(f"number {number}")
        return {"number": number}

    s = searcher(trials=3)
    s.make_config = make
    s.on_invalid = lambda number, values, reason: rejected.append((number, reason))
    assert [s.suggest(str(i)) for i in range(3)] == [{"number": None}, {"number": 1}, StudySearcher.FINISHED]
    assert rejected == [(0, "number 0"), (2, "number 2")]
    assert [t.state for t in s.study.trials] == [TrialState.FAIL, TrialState.RUNNING, TrialState.FAIL]
