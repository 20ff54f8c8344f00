from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from slimfront.search.config.objectives import OBJECTIVES, Constraint
from slimfront.search.config.samplers import SAMPLERS, build_sampler, sampler_options
from slimfront.search.config.search_space import SearchSpace
from slimfront.search.config.settings import SearchOptions
from slimfront.search.config.space import Parameter
from slimfront.search.engine.proposals import Proposals
from slimfront.search.engine.searcher import InvalidCandidate, StudySearcher, Unfinished, reconcile
from slimfront.search.record.events import (
    Event,
    NetworkMeasured,
    ProposalRepeated,
    TrialBegan,
    TrialEnded,
    TrialInterrupted,
)
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.study import rebuild
from slimfront.search.record.trials import TrialRecord
from slimfront.trainables.errors import UserError
from tests.marks import often

OBJECTIVE_NAMES = ["val_accuracy", "nonzero_params"]
SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(0, 1),
    "n": IntDistribution(1, 9),
    "c": CategoricalDistribution("ab"),
}


def proposals() -> Proposals:
    parameters = {
        "x": Parameter(low=0, high=1),
        "n": Parameter(low=1, high=9),
        "c": Parameter(choices=("a", "b")),
    }
    return Proposals(SearchSpace(parameters), SPACE)


def new_study(sampler: str = "random", seed: int = 0) -> optuna.Study:
    return optuna.create_study(
        sampler=build_sampler(sampler, seed), directions=["maximize", "minimize"]
    )


def searcher(study: optuna.Study | None = None, trials: int = 3, **options: Any) -> StudySearcher:
    def make(trial: Unfinished) -> dict[str, Any]:
        return {"number": trial.number, "values": trial.values, "checkpoint": trial.checkpoint}

    return StudySearcher(
        study or new_study(),
        options.pop("proposals", None) or proposals(),
        OBJECTIVE_NAMES,
        options.pop("make", make),
        trials,
        **options,
    )


def suggested(s: StudySearcher, trial_id: str = "any") -> dict[str, Any]:
    config = s.suggest(trial_id)
    assert isinstance(config, dict)
    return config


def ledger_with(*events: Event) -> Ledger:
    book = Ledger([OBJECTIVES[name] for name in OBJECTIVE_NAMES], {"nonzero_params": 1000.0})
    for event in events:
        book.apply(event)
    return book


def begun(number: int | None) -> dict[str, Any]:
    return TrialBegan(number=number, values={"x": 0.5}, seed=0)


def measured(
    number: int | None, accuracy: float = 0.9, size: float = 100, epoch: int = 1
) -> dict[str, Any]:
    measures = {"val_accuracy": accuracy, "nonzero_params": size}
    checkpoint = f"checkpoint of {number} at {epoch}"
    return NetworkMeasured(
        number=number, epoch=epoch, measures=measures, compaction=[], checkpoint=checkpoint
    )


def ended(
    number: int | None, status: str = "completed", reason: str | None = None
) -> dict[str, Any]:
    return TrialEnded(number=number, status=status, reason=reason)


def record(*events: Event) -> TrialRecord:
    return ledger_with(begun(0), *events).trials[0]


def test_the_dense_reference_comes_first_and_is_never_told() -> None:
    s = searcher()
    assert suggested(s) == {"number": None, "values": {}, "checkpoint": None}
    dense = ledger_with(begun(None), measured(None), ended(None)).dense
    assert dense is not None
    s.tell(dense)
    assert s.study.trials == []


def test_as_many_trials_as_asked_for_then_finished() -> None:
    s = searcher(trials=2)
    assert [suggested(s, f"ray{i}")["number"] for i in range(3)] == [None, 0, 1]
    for i in range(3):
        assert s.suggest("any") is None  # one that runs may have to begin again
        s.on_trial_complete(f"ray{i}")
    assert s.suggest("any") == StudySearcher.FINISHED


def test_a_trial_that_has_to_begin_again_is_suggested_again_from_its_last_checkpoint() -> None:
    s = searcher(trials=1)
    suggested(s, "dense"), suggested(s, "lost")
    s.on_trial_complete("dense")
    s.on_trial_complete("lost", error=True)
    s.again(record(measured(0, epoch=4)))
    assert suggested(s, "again") == {
        "number": 0,
        "values": {"x": 0.5},
        "checkpoint": "checkpoint of 0 at 4",
    }
    s.on_trial_complete("again")
    assert s.suggest("any") == StudySearcher.FINISHED


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([measured(0, float("nan")), ended(0)], "not finite"),
        ([measured(0, float("inf")), ended(0)], "not finite"),
        ([ended(0)], "missing"),
        ([measured(0), ended(0, "failed", "diverged in epoch 3")], "diverged in epoch 3"),
    ],
)
def test_a_trial_without_usable_objectives_is_told_as_failed_with_its_reason(
    events: list[Event], reason: str
) -> None:
    s = searcher()
    suggested(s), suggested(s)
    s.tell(record(*events))
    assert s.study.trials[0].state == TrialState.FAIL
    assert reason in s.study.trials[0].user_attrs["failure"]


@pytest.mark.parametrize("status", ["completed", "stopped"])
def test_a_trial_that_ended_is_told_with_the_values_of_its_last_network(status: str) -> None:
    s = searcher()
    suggested(s), suggested(s)
    s.tell(record(measured(0, 0.95, 90), measured(0, 0.8, 70, epoch=2), ended(0, status)))
    assert s.study.trials[0].values == [0.8, 70]


def test_constraints_are_told_and_the_sampler_knows_what_is_feasible() -> None:
    s = searcher(
        constraints=[
            Constraint.parse("val_accuracy", ">= 0.85"),
            Constraint.parse("nonzero_params", "<= 100"),
        ]
    )
    suggested(s), suggested(s), suggested(s)
    s.tell(record(measured(0, 0.8, 70), ended(0)))
    good = ledger_with(begun(1), measured(1, 0.9, 90), ended(1)).trials[0]
    s.tell(good)
    assert [trial.number for trial in s.study.best_trials] == [1]


def test_no_new_trials_once_it_is_enough_but_those_left_unfinished_are_continued() -> None:
    said: list[str] = []
    s = searcher(
        unfinished=[Unfinished(None, {}), Unfinished(7, {"x": 1})],
        enough=lambda: "nothing was gained",
        on_exhausted=said.append,
    )
    left = s.remaining
    assert [suggested(s)["number"] for _ in range(2)] == [None, 7]
    s.on_trial_complete("any")
    assert s.suggest("any") == StudySearcher.FINISHED
    assert s.suggest("other") == StudySearcher.FINISHED
    assert said == [f"nothing was gained, so that the search ends with {left} of its trials left"]


@pytest.mark.parametrize("sampler", often(sorted(SAMPLERS), *sorted(set(SAMPLERS) - {"gp"})))
def test_every_sampler_takes_objectives_and_constraints_and_repeats_itself_with_a_seed(
    sampler: str,
) -> None:
    def run(seed: int) -> list[dict[str, Any]]:
        s = searcher(
            new_study(sampler, seed),
            trials=14,
            unfinished=[],
            constraints=[Constraint.parse("val_accuracy", ">= 0.2")],
        )
        values = []
        for number in range(14):
            values.append(suggested(s)["values"])
            events = [
                begun(number),
                measured(number, values[-1]["x"], values[-1]["n"] + values[-1]["x"]),
                ended(number),
            ]
            s.tell(ledger_with(*events).trials[0])
        return values

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_later_session_does_not_propose_what_the_first_did(sampler: str) -> None:
    options = SearchOptions(sampler=sampler, seed=2**32 - 1)
    study = new_study()
    study.sampler = options.build_sampler()
    before = {study.ask(SPACE).params["x"] for _ in range(4)}
    study.sampler = options.build_sampler(session=2)
    after = {study.ask(SPACE).params["x"] for _ in range(4)}
    assert before & after == set()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_sampler_refuses_options_that_it_does_not_have(sampler: str) -> None:
    with pytest.raises(ValueError, match=f"the sampler '{sampler}' has no option 'trials'"):
        build_sampler(sampler, 0, {"trials": 3})
    assert "seed" not in sampler_options(sampler)


@pytest.mark.parametrize(
    ("sampler", "options", "said"),
    [
        ("gp", {"n_startup_trials": "many"}, "n_startup_trials of .* is 'many', and must be int"),
        ("tpe", {"multivariate": "sure"}, "must be bool"),
        ("nsga2", {"population_size": 2.5}, "must be int"),
        ("nsga2", {"crossover_prob": "many"}, "must be float"),
        ("qmc", {"scramble": 3}, "must be bool"),
        ("tpe", {"gamma": 3}, "has no option 'gamma'"),  # a function
        ("tpe", {"constraints_func": 3}, "has no option"),
        ("nsga3", {"reference_points": 3}, "has no option"),
    ],
)
def test_an_option_of_another_type_is_refused(
    sampler: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build_sampler(sampler, 0, options)


def test_a_sampler_takes_its_options_and_says_what_it_does_not_take() -> None:
    assert build_sampler("tpe", 0, {"n_startup_trials": 3})._n_startup_trials == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="does not take these options"):
        build_sampler("nsga2", 0, {"population_size": 1})
    with pytest.raises(ValueError, match="unknown sampler 'tep'; did you mean 'tpe'"):
        build_sampler("tep", 0)


def test_values_that_make_no_candidate_are_rejected_and_the_next_one_is_asked_for() -> None:
    rejected: list[tuple[int, str]] = []

    def make(trial: Unfinished) -> dict[str, Any]:
        if trial.number in (0, 2):
            raise InvalidCandidate(f"number {trial.number}")
        return {"number": trial.number}

    s = searcher(
        make=make, on_invalid=lambda number, values, reason: rejected.append((number, reason))
    )
    assert [s.suggest(str(i)) for i in range(3)] == [{"number": None}, {"number": 1}, None]
    assert rejected == [(0, "number 0"), (2, "number 2")]


def test_after_a_crash_every_trial_that_was_given_out_is_found_again() -> None:
    study = new_study()
    s = searcher(study, trials=6)
    for _ in range(6):
        suggested(s)
    s.tell(record(measured(0), ended(0)))
    book = ledger_with(
        *(event for number in (None, 0, 1, 2, 3) for event in [begun(number)]),
        *(
            measured(0),
            ended(0),
            measured(1),
            ended(1),
            measured(2, epoch=5),
            measured(2, epoch=10),
            ended(3, "failed", "died"),
        ),
        TrialInterrupted(number=None),
    )
    unfinished, untold = reconcile(study, proposals(), book)
    assert [(u.number, u.checkpoint) for u in unfinished] == [
        (None, None),
        (2, "checkpoint of 2 at 10"),
        (4, None),
    ]
    assert unfinished[-1].values == study.trials[4].params  # the journal had not heard of it
    assert [r.number for r in untold] == [1, 3]
    again = searcher(study, trials=7, unfinished=unfinished)
    for one in untold:
        again.tell(one)
    assert [t.state.name for t in study.trials] == [
        "COMPLETE",
        "COMPLETE",
        "RUNNING",
        "FAIL",
        "RUNNING",
    ]
    assert [suggested(again)["number"] for _ in range(5)] == [None, 2, 4, 5, 6]
    again.on_trial_complete("any")
    assert again.suggest("any") == StudySearcher.FINISHED


def test_a_trial_whose_values_were_only_half_suggested_gets_the_rest() -> None:
    study = new_study()
    half = study.ask()
    x = half.suggest_float("x", 0, 1)
    (one,) = reconcile(study, proposals(), ledger_with(begun(None), measured(None), ended(None)))[0]
    assert one.values["x"] == x
    assert set(one.values) == set(SPACE)
    assert study.trials[0].params == one.values


def test_a_study_that_lost_a_trial_of_the_journal_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"has no trial-000, which the journal has; .*slimfront rebuild"
    ):
        reconcile(new_study(), proposals(), ledger_with(begun(0)))


def few() -> Proposals:
    """Two by two choices."""
    parameters = {"a": Parameter(choices=(1, 2)), "b": Parameter(choices=("x", "y"))}
    distributions = {path: p.distribution(integer=False) for path, p in parameters.items()}
    return Proposals(SearchSpace(parameters), distributions)


def begun_with(number: int, **values: Any) -> Event:
    return TrialBegan(number=number, values=values, seed=0)


def told(study: optuna.Study) -> list[tuple[str, Any]]:
    return [(trial.state.name, trial.values) for trial in study.trials]


class OneIdea(optuna.samplers.RandomSampler):
    """Proposes the first choice of everything, again and again."""

    def sample_independent(self, *args: Any) -> Any:
        return args[-1].choices[0]


@pytest.mark.parametrize("sampler", [None, OneIdea(seed=0)])
def test_a_space_is_exhausted_when_each_of_its_candidates_was_tried_once(
    sampler: optuna.samplers.BaseSampler | None,
) -> None:
    sentences: list[str] = []
    repeats: list[int] = []
    study = new_study()
    study.sampler = sampler or study.sampler

    def repeat(number: int, values: dict[str, Any], first: int) -> bool:
        repeats.append(number)
        assert study.trials[first].params == values
        return True

    s = searcher(
        study,
        trials=32,
        proposals=few(),
        unfinished=[],
        on_repeat=repeat,
        on_exhausted=sentences.append,
    )
    trained = []
    while isinstance(config := s.suggest("any"), dict):
        trained.append(tuple(config["values"].values()))
        number = config["number"]
        size = 100.0 + number
        s.tell(ledger_with(begun(number), measured(number, 0.5, size), ended(number)).trials[0])
        s.on_trial_complete("any")
    assert config == StudySearcher.FINISHED
    assert sorted(trained) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert len(study.trials) == 4 + len(repeats)
    # A proposal that repeats another is told the same.
    by_values: dict[str, set[float]] = {}
    for trial in study.trials:
        assert trial.state is TrialState.COMPLETE
        by_values.setdefault(str(trial.params), set()).add(trial.values[1])
    assert [len(results) for results in by_values.values()] == [1, 1, 1, 1]
    assert len(sentences) == 1
    assert sentences[0].startswith("all 4 combinations of the space were tried, so that the search")
    assert "ends with 28 of its trials left" in sentences[0]


def test_what_is_being_trained_is_not_begun_again_and_told_when_that_has_ended() -> None:
    study = new_study()
    for _ in range(3):
        study.enqueue_trial({"a": 1, "b": "y"})
    study.enqueue_trial({"a": 2, "b": "y"})
    s = searcher(study, trials=2, proposals=few(), unfinished=[])
    assert suggested(s)["number"] == 0
    assert suggested(s)["number"] == 3
    s.tell(ledger_with(begun(0), measured(0, 0.75, 70), ended(0)).trials[0])
    complete = ("COMPLETE", [0.75, 70.0])
    assert told(study) == [complete, complete, complete, ("RUNNING", None)]
    # A repeat is none of the trials that were asked for.
    assert s.remaining == 0


def test_what_failed_is_not_tried_again_and_its_repeat_fails_likewise() -> None:
    study = new_study()
    for _ in range(2):
        study.enqueue_trial({"a": 1, "b": "y"})
    s = searcher(study, trials=2, proposals=few(), unfinished=[])
    suggested(s)
    s.tell(ledger_with(begun(0), ended(0, "failed", "diverged")).trials[0])
    assert suggested(s)["number"] == 2
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "RUNNING"]
    assert study.trials[1].user_attrs["failure"] == "diverged"


def test_a_repeat_that_the_journal_does_not_take_is_not_told() -> None:
    study = new_study()
    for _ in range(2):
        study.enqueue_trial({"a": 1, "b": "y"})
    s = searcher(study, trials=2, proposals=few(), unfinished=[], on_repeat=lambda *_: False)
    suggested(s)
    s.tell(ledger_with(begun(0), measured(0), ended(0)).trials[0])
    suggested(s)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "RUNNING"]


def test_a_resumed_search_knows_what_was_trained_and_what_repeated_it() -> None:
    study = new_study()
    values = {"a": 1, "b": "y"}
    for _ in range(5):
        study.enqueue_trial(values)
    for _ in range(4):
        few().suggested(study.ask())
    book = ledger_with(
        begun_with(0, **values),
        ProposalRepeated(number=1, values=values, first=0),
        ProposalRepeated(number=2, values=values, first=0),
        measured(0, 0.75, 70),
        ended(0),
    )
    study.tell(0, [0.75, 70])
    study.tell(1, [0.75, 70])
    # Trial 2 was not told, and the journal has not heard of 3.
    unfinished, untold = reconcile(study, few(), book)
    assert untold == []
    assert [(one.number, one.values) for one in unfinished] == [(None, {}), (3, values)]
    repeats: list[int] = []

    def repeat(number: int, *_: Any) -> bool:
        repeats.append(number)
        return True

    s = searcher(
        study,
        trials=2,
        proposals=few(),
        unfinished=unfinished,
        earlier=book,
        on_repeat=repeat,
    )
    assert suggested(s)["number"] is None
    again = suggested(s)
    assert again["values"] != values
    assert repeats == list(range(3, again["number"]))
    assert told(study)[:5] == 5 * [("COMPLETE", [0.75, 70.0])]
    s.on_trial_complete("any")
    assert s.suggest("any") == StudySearcher.FINISHED


def test_a_study_that_lost_a_repeat_of_the_journal_is_refused() -> None:
    study = new_study()
    few().suggested(study.ask())
    book = ledger_with(begun(0), ProposalRepeated(number=1, values={}, first=0))
    with pytest.raises(UserError, match="has no trial-001, which the journal has"):
        reconcile(study, few(), book)


def test_a_study_made_anew_has_repeats_and_values_outside_of_the_bounds() -> None:
    book = ledger_with(
        begun_with(0, x=7.0, n=2, c="a"),
        begun_with(1, x=0.25, n=2, c="a"),
        ProposalRepeated(number=3, values={"x": 0.25, "n": 2, "c": "a"}, first=1),
        measured(1, 0.75, 70),
        ended(1),
    )
    study = new_study()
    rebuild(study, SPACE, book)
    assert [trial.params for trial in study.trials] == [
        {"x": 7.0, "n": 2, "c": "a"},
        {"x": 0.25, "n": 2, "c": "a"},
        {},
        {"x": 0.25, "n": 2, "c": "a"},
    ]
    unfinished, untold = reconcile(study, proposals(), book)
    # Trial 2 was proposed and never began; it gets its values now.
    assert [one.number for one in unfinished] == [None, 0, 2]
    assert set(unfinished[-1].values) == set(SPACE)
    s = searcher(study, unfinished=unfinished, earlier=book)
    for one in untold:
        s.tell(one)
    assert [trial.state.name for trial in study.trials] == [
        "RUNNING",
        "COMPLETE",
        "RUNNING",
        "COMPLETE",
    ]


@pytest.mark.parametrize(
    "sampler", ["gp", "nsga2", "nsga3", "qmc", "random", "tpe", "tpe, multivariate"]
)
def test_every_sampler_proposes_in_a_space_with_conditions_without_a_warning(
    sampler: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = {
        "kind": Parameter(choices=("a", "b")),
        "of.a": Parameter(low=0, high=1, when={"kind": ("a",)}),
        "of.b": Parameter(low=2, high=3, when={"kind": ("b",)}),
    }
    name, _, option = sampler.partition(", ")
    options = {option: True} if option else {}
    study = new_study()
    study.sampler = build_sampler(name, 0, options, conditional=True)
    distributions = {path: p.distribution(integer=False) for path, p in parameters.items()}
    asked = Proposals(SearchSpace(parameters), distributions)
    s = searcher(study, trials=30, proposals=asked, unfinished=[])
    seen = set()
    for number in range(24):
        values = suggested(s)["values"]
        seen.add(tuple(values))
        size = sum(value for value in values.values() if value not in ("a", "b"))
        book = ledger_with(begun(number), measured(number, size, number), ended(number))
        s.tell(book.trials[0])
    assert seen == {("kind", "of.a"), ("kind", "of.b")}
    warned = [str(one.message) for one in recwarn if one.category is not ExperimentalWarning]
    assert warned == []
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == []
    if option:
        assert study.sampler._group is True  # type: ignore[attr-defined]


def test_samplers_are_told_what_misses_the_region() -> None:
    study = new_study()

    def outside(epoch: int, found: Mapping[str, Any]) -> float:
        return float(found["val_accuracy"]) - epoch

    told = searcher(study, trials=2, unfinished=(), outside_region=outside)
    for number, epoch in ((0, 1), (1, 3)):
        suggested(told)
        book = ledger_with(begun(number), measured(number, 2.0, 10, epoch), ended(number))
        told.tell(book.trials[0])
    found = [trial.constraints["tolerance"] for trial in study.trials]
    assert found == [1.0, -1.0]
