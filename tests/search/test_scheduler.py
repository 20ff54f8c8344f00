"""Multi-objective ASHA against a slow simulation of the published algorithm, and with one objective
against Ray's ASHA."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from slimfront.search.engine import scheduler
from slimfront.search.engine.scheduler import (
    MultiObjectiveASHA,
    crowding_order,
    epsilon_net_order,
    ranking,
    rung_times,
)


def trial(name: str) -> Any:
    return SimpleNamespace(trial_id=name, config={"number": name})


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def farthest(scaled: dict[int, list[float]], point: int, taken: list[int]) -> float:
    """How far a point is from the nearest that is taken, but for rounding: equals are equal."""
    return round(min(math.dist(scaled[point], scaled[other]) for other in taken), 9)


def slow_ranking(points: list[tuple[float, ...]]) -> list[int]:
    """Front by front, in each the ε-net order, word for word: always the point farthest from those
    already taken."""
    left, order = set(range(len(points))), []
    while left:
        front = sorted(i for i in left if not any(dominates(points[j], points[i]) for j in left))
        spans = [
            (min(points[i][k] for i in front), max(points[i][k] for i in front))
            for k in range(len(points[0]))
        ]
        scaled = {
            i: [(v - lo) / ((hi - lo) or 1) for v, (lo, hi) in zip(points[i], spans, strict=True)]
            for i in front
        }
        taken = [min(front, key=lambda i: points[i][0])]
        while len(taken) < len(front):
            rest = [i for i in front if i not in taken]
            taken.append(max(rest, key=lambda i: (farthest(scaled, i, taken), -i)))
        order += taken
        left -= set(front)
    return order


class Simulation:
    """The algorithm in memory: a list of points per rung; who goes on has fewer than ⌈n / η⌉ of the
    n others before it."""

    def __init__(self, grace: int, reduction: int, longest: int) -> None:
        self.rungs: dict[int, list[tuple[float, ...]]] = {}
        time = grace
        while time < longest:
            self.rungs[time] = []
            time *= reduction
        self.reduction = reduction

    def report(self, time: int, point: tuple[float, ...]) -> bool:
        if time not in self.rungs:
            return True
        others = self.rungs[time]
        order = slow_ranking([point, *others])
        others.append(point)
        return len(others) == 1 or order.index(0) < math.ceil((len(others) - 1) / self.reduction)


# Coarse numbers, so that ties and equal points happen.
values = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points=values)
def test_the_ranking_is_that_of_the_slow_one(points: list[tuple[int, int]]) -> None:
    assert ranking(np.array(points, dtype=float)) == slow_ranking(
        [(float(a), float(b)) for a, b in points]
    )


@given(st.data())
def test_it_decides_as_the_simulation_does_whatever_the_order_of_results(
    data: st.DataObject,
) -> None:
    grace, reduction, longest = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 4)), 20
    mine = MultiObjectiveASHA(
        {"a": "min", "b": "max"}, time_attr="t", grace=grace, reduction=reduction, max_time=longest
    )
    theirs = Simulation(grace, reduction, longest)
    running = {f"t{i}": 0 for i in range(data.draw(st.integers(1, 10)))}
    for name in running:
        mine.on_trial_add(None, trial(name))
    while running:
        name = data.draw(st.sampled_from(sorted(running)))
        running[name] += 1
        a, b = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
        decision = mine.on_trial_result(None, trial(name), {"t": running[name], "a": a, "b": b})
        assert (decision == TrialScheduler.CONTINUE) == theirs.report(
            running[name], (float(a), -float(b))
        )
        if decision == TrialScheduler.STOP or running[name] >= longest:
            del running[name]


@given(st.data())
def test_with_one_objective_it_decides_as_rays_asha_does(data: st.DataObject) -> None:
    # Ray compares with a percentile between two earlier values; a value strictly between those two
    # has no rank to decide by.
    mine = MultiObjectiveASHA({"a": "max"}, time_attr="t", grace=1, reduction=3, max_time=10)
    rays = ASHAScheduler(
        time_attr="t", metric="a", mode="max", grace_period=1, reduction_factor=3, max_t=10
    )
    earlier: list[float] = []
    for number in range(data.draw(st.integers(1, 15))):
        value = float(data.draw(st.integers(0, 20)))
        one = trial(str(number))
        for each in (mine, rays):
            each.on_trial_add(SimpleNamespace(), one)
        result = {"t": 1, "a": value}
        decisions = [each.on_trial_result(SimpleNamespace(), one, result) for each in (mine, rays)]
        position = (1 - 1 / 3) * (len(earlier) - 1)
        between = False
        if earlier:
            low, high = sorted(earlier)[math.floor(position)], sorted(earlier)[math.ceil(position)]
            between = low <= value < high
        tied = value in earlier
        if not between and not tied:
            assert decisions[0] == decisions[1], (value, earlier)
        earlier.append(value)


def test_a_crowd_is_thinned_and_ends_are_kept_by_both_tie_breaks() -> None:
    front = np.array([[0, 10], [1, 9], [1.1, 8.9], [1.2, 8.8], [10, 0]], dtype=float)
    assert epsilon_net_order(front)[:2] == [0, 4]
    assert set(crowding_order(front)[:2]) == {0, 4}
    assert epsilon_net_order(front)[2] in (1, 3)


def test_a_trial_without_a_finite_objective_is_stopped_and_ranks_last() -> None:
    asha = MultiObjectiveASHA({"a": "min"}, time_attr="t")
    for name in "xy":
        asha.on_trial_add(None, trial(name))
    assert asha.on_trial_result(None, trial("x"), {"t": 1, "a": math.nan}) == TrialScheduler.STOP
    assert asha.on_trial_result(None, trial("y"), {"t": 1}) == TrialScheduler.STOP
    assert ranking(np.array([[math.nan], [2.0], [1.0]])) == [2, 1, 0]


def test_a_trial_is_judged_once_at_each_rung_at_the_first_result_at_or_after_it() -> None:
    asha = MultiObjectiveASHA({"a": "min"}, time_attr="t", grace=3, reduction=3, max_time=100)
    asha.on_trial_add(None, trial("x"))
    for time in (2, 4, 5, 30):
        asha.on_trial_result(None, trial("x"), {"t": time, "a": float(time)})
    assert asha.levels == [[3, 9, 27, 81]]
    assert {rung: losses["x"].tolist() for (_, rung), losses in asha.rungs.items()} == {
        0: [4.0],
        1: [30.0],
        2: [30.0],
    }


def test_rungs_and_brackets_come_back_after_a_restart() -> None:
    said: list[str] = []

    def make() -> MultiObjectiveASHA:
        earlier, objectives = [json.loads(line) for line in said], {"a": "min", "b": "max"}
        return MultiObjectiveASHA(
            objectives,
            time_attr="t",
            reduction=2,
            max_time=9,
            brackets=2,
            earlier=earlier,
            record=lambda e: said.append(json.dumps(e)),
        )

    first = make()
    for number in range(6):
        first.on_trial_add(None, trial(str(number)))
        first.on_trial_result(
            None,
            trial(str(number)),
            {"t": 4, "a": float(number), "b": math.nan if number == 3 else 1.0},
        )
    again = make()
    assert again.brackets == first.brackets == {str(n): n % 2 for n in range(6)}
    assert again.rungs.keys() == first.rungs.keys()
    for key, losses in first.rungs.items():
        for name, loss in losses.items():
            np.testing.assert_array_equal(again.rungs[key][name], loss)
    # A trial that comes back keeps its bracket and is not judged again.
    again.on_trial_add(None, trial("2"))
    before = len(said)
    again.on_trial_result(None, trial("2"), {"t": 5, "a": 100.0, "b": 0.0})
    assert len(said) == before == 6 + 3 * 3 + 3 * 2


def test_exempt_trials_are_neither_judged_nor_counted() -> None:
    asha = MultiObjectiveASHA(
        {"a": "min"}, time_attr="t", exempt=lambda one: one.trial_id == "reference"
    )
    asha.on_trial_add(None, trial("reference"))
    assert (
        asha.on_trial_result(None, trial("reference"), {"t": 1, "a": 5.0})
        == TrialScheduler.CONTINUE
    )
    assert asha.rungs == {}


def test_rung_times_end_before_the_longest() -> None:
    assert rung_times(2, 3, 54) == [2, 6, 18]
    assert rung_times(2, 3, 55) == [2, 6, 18, 54]
    assert rung_times(5, 3, 5) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"objectives": {}},
        {"objectives": {"a": "up"}},
        {"grace": 0},
        {"reduction": 1},
        {"brackets": 0},
        {"tie_break": "luck"},
    ],
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"objectives map names|must be above"):
        MultiObjectiveASHA(**({"objectives": {"a": "min"}} | wrong))


def test_it_needs_nothing_else_of_slimfront() -> None:
    tree = ast.parse(Path(scheduler.__file__).read_text())
    modules = {
        n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
    }
    modules |= {
        alias.name.split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for alias in n.names
    }
    assert modules.isdisjoint({"slimfront"})


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(120)
@pytest.mark.slow
def test_it_works_with_any_function_that_reports(tmp_path: Path) -> None:
    def trainable(config: dict[str, Any]) -> None:
        for step in range(1, 10):
            tune.report({"step": step, "good": config["x"], "cost": config["x"] % 3})

    asha = MultiObjectiveASHA(
        {"good": "max", "cost": "min"}, time_attr="step", grace=1, reduction=3, max_time=9
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"x": tune.grid_search([8, 7, 6, 5, 4, 3, 2, 1, 0])},
        tune_config=tune.TuneConfig(scheduler=asha, max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    last = {result.config["x"]: result.metrics["step"] for result in tuner.fit()}
    assert last[8] == 9
    assert sum(step == 1 for step in last.values()) >= 4


def test_what_misses_what_is_wanted_ranks_behind_what_does_not() -> None:
    losses = np.array([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0], [6.0, 4.0], [np.nan, 1.0]])
    assert ranking(losses)[0] == 0
    violations = np.array([0.2, 0.0, 0.1, -1.0, 0.0])
    order = ranking(losses, violations=violations)
    assert set(order[:2]) == {1, 3}
    assert order[2:] == [2, 0, 4]


def test_violations_count_at_a_rung_and_come_back_after_a_restart() -> None:
    entries: list[dict[str, Any]] = []

    def made(earlier: list[dict[str, Any]]) -> MultiObjectiveASHA:
        return MultiObjectiveASHA(
            {"q": "max", "s": "min"},
            grace=1,
            reduction=2,
            record=entries.append,
            earlier=list(earlier),
            violation=lambda result: 0.5 - result["q"],
        )

    scheduler = made([])
    decisions = {}
    for name, quality, size in (("poor", 0.1, 1), ("good", 0.9, 9)):
        scheduler.on_trial_add(None, trial(name))
        decisions[name] = scheduler.on_trial_result(
            None, trial(name), {"training_iteration": 1, "q": quality, "s": size}
        )
    assert [entry.get("violation") for entry in entries if "rung" in entry] == [0.4, None]
    again = made(entries)
    for each in (scheduler, again):
        each.on_trial_add(None, trial("smaller"))
        # Of two others the top one goes on: no dominated one, but one that misses what is wanted.
        found = each.on_trial_result(
            None, trial("smaller"), {"training_iteration": 1, "q": 0.2, "s": 0.5}
        )
        assert found == "STOP"
