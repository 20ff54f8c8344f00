from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from slimfront.search.record.study import OnlyWriter

SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(1e-3, 1, log=True),
    "n": IntDistribution(1, 9),
    "c": CategoricalDistribution("ab"),
}


def open_study(storage: optuna.storages.BaseStorage) -> optuna.Study:
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=3, constant_liar=True)
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=sampler,
        directions=["maximize", "minimize"],
        load_if_exists=True,
    )


def database(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path}/study.db")


def work(study: optuna.Study, trials: int) -> None:
    """Some trials complete, some fail, some go on."""
    for index in range(trials):
        trial = study.ask(SPACE)
        if index % 3 == 0:
            trial.set_constraint("small", index - 4.0)
            study.tell(trial, [index / 10, 1.0])
        elif index % 3 == 1:
            trial.set_user_attr("failure", "it broke")
            study.tell(trial, state=TrialState.FAIL)


def contents(study: optuna.Study) -> list[tuple[Any, ...]]:
    def plain(t: FrozenTrial) -> tuple[Any, ...]:
        values = None if t.values is None else tuple(t.values)
        return t.number, t.state, t.params, values, t.user_attrs, t.system_attrs, t.distributions

    return [plain(trial) for trial in study.get_trials()]


def test_all_that_is_known_of_a_study_is_in_the_database_and_is_found_there_again(
    tmp_path: Path,
) -> None:
    database(tmp_path).create_new_study([optuna.study.StudyDirection.MINIMIZE], "another")
    study = open_study(OnlyWriter(database(tmp_path)))
    study.set_user_attr("whose", "ours")
    study.enqueue_trial({"x": 0.5, "n": 2, "c": "b"})
    work(study, 7)
    study.enqueue_trial({"x": 0.25, "n": 3, "c": "a"})
    there = optuna.load_study(study_name="s", storage=database(tmp_path))
    assert len(contents(study)) == 8
    assert contents(study)[0][2] == {"x": 0.5, "n": 2, "c": "b"}
    assert contents(there) == contents(study)

    again = open_study(OnlyWriter(database(tmp_path)))
    assert contents(again) == contents(study)
    assert again.user_attrs == {"whose": "ours"}
    running = again.get_trials(states=[TrialState.RUNNING])[0]
    again.tell(optuna.Trial(again, running._trial_id), [0.9, 0.1])
    work(again, 4)
    assert contents(again)[7][2] == {"x": 0.25, "n": 3, "c": "a"}
    assert contents(optuna.load_study(study_name="s", storage=database(tmp_path))) == contents(
        again
    )


def test_it_proposes_what_optuna_proposes_on_the_database_itself(tmp_path: Path) -> None:
    mine, plain = (
        open_study(OnlyWriter(database(tmp_path))),
        open_study(optuna.storages.InMemoryStorage()),
    )
    work(mine, 6)
    work(plain, 6)
    assert [trial.params for trial in mine.get_trials()] == [
        trial.params for trial in plain.get_trials()
    ]


def test_a_trial_costs_the_database_the_same_whatever_is_under_way(tmp_path: Path) -> None:
    there = database(tmp_path)
    asked: list[int] = []
    event.listen(
        there.engine,
        "before_cursor_execute",
        lambda _c, _cursor, _statement, values, *_: asked.append(len(values)),
    )
    study = open_study(OnlyWriter(there))
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    cost = []
    for _ in range(6):
        study.tell(study.ask(SPACE), [0.0, 1.0])
        asked.clear()
        study.ask(SPACE)  # and goes on
        cost.append((len(asked), sum(asked)))
    assert len(set(cost)) == 1


def test_a_second_study_of_the_same_name_is_refused(tmp_path: Path) -> None:
    open_study(OnlyWriter(database(tmp_path)))
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(study_name="s", storage=OnlyWriter(database(tmp_path)))
