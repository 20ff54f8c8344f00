"""Early stopping judges networks of every task in the right direction."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.schedulers import TrialScheduler

from slimfront.search.config.objectives import Direction
from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import _scheduler, run_search
from slimfront.search.engine.scheduler import MultiObjectiveASHA
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.messages import TrialOrder
from slimfront.trainables.trainable import CandidateTrainable
from tests.search.searches import runs_of
from tests.trainables.tasks.made import JOBS

GOOD, BAD = 1e-2, 1e-9
RUNG = 4


def config(job: str, **changes: Any) -> Config:
    tree = {
        "name": "small",
        **JOBS[job],
        "training": {"epochs": 12, "batch_size": 32, "seed": 1, "report_every": 4},
        "one_shot": {"steps": 0},
        "space": {"training.lr": {"low": BAD, "high": GOOD, "log": True}},
        "search": {"trials": 2, "early_stopping": {"grace": RUNG, "reduction": 2}},
    }
    return Config.model_validate(tree | changes)


def scheduler_of(of: Config) -> MultiObjectiveASHA:
    """The scheduler that a search of this config has."""
    book = Ledger(of.chosen_objectives(), {}, quality=of.quality())
    session = cast("Any", SimpleNamespace(config=of, earlier=(), ledger=book))
    observer = cast("Any", SimpleNamespace(write=lambda event: None))
    made = _scheduler(session, observer)
    assert made is not None
    return made


def report(of: Config, lr: float) -> dict[str, Any]:
    """What a trial with this learning rate reports at the first rung."""
    candidate = of.candidate({"training.lr": lr}).model_dump(mode="json")
    order = TrialOrder(candidate, {"CPU": 1.0}, number=0, report_at=(RUNG,))
    trainable = CandidateTrainable(order.as_config())
    try:
        return dict(trainable.train())
    finally:
        trainable.stop()


@pytest.mark.parametrize("job", JOBS)
def test_of_two_networks_of_a_size_the_worse_one_stops(job: str) -> None:
    of = config(job)
    quality = of.chosen_objectives()[0]
    good, bad = report(of, GOOD), report(of, BAD)
    assert good["epoch"] == bad["epoch"] == RUNG
    assert good["nonzero_params"] == bad["nonzero_params"]
    larger = quality.direction is Direction.MAXIMIZE
    assert (good[quality.name] > bad[quality.name]) is larger
    assert scheduler_of(of).objectives[quality.name] == ("max" if larger else "min")
    for results, decisions in (
        ((good, bad), [TrialScheduler.CONTINUE, TrialScheduler.STOP]),
        ((bad, good), [TrialScheduler.CONTINUE, TrialScheduler.CONTINUE]),
    ):
        scheduler, found = scheduler_of(of), []
        for number, result in enumerate(results):
            trial = cast("Any", SimpleNamespace(config={"number": number}))
            scheduler.on_trial_add(None, trial)
            found.append(scheduler.on_trial_result(None, trial, result))
        assert found == decisions


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_a_search_stops_the_trials_with_the_larger_error(tmp_path: Path) -> None:
    lrs = [GOOD, BAD, BAD * 10, GOOD / 1.1]
    small = config(
        "regression",
        search={
            "trials": len(lrs),
            "concurrency": 1,
            "sampler": "random",
            "early_stopping": {"grace": RUNG, "reduction": 2},
            "start_from": [{"training.lr": lr} for lr in lrs],
            "storage_path": str(tmp_path / "runs"),
        },
        tracking={"uri": f"sqlite:///{tmp_path}/slimfront.db"},
    )
    result = run_search(small)
    trials = {record.values["training.lr"]: record for record in result.ledger.trials}
    first = {lr for lr, record in trials.items() if record.epoch == RUNG}
    assert first == {BAD, BAD * 10}
    assert all(trials[lr].status == "stopped" for lr in first)
    assert trials[GOOD].status == "completed" and trials[GOOD].epoch == 12
    assert {point.trial.values["training.lr"] for point in result.front} <= {GOOD, GOOD / 1.1}
    _, runs = runs_of(tmp_path, result)
    reason = runs[trials[BAD].label].data.tags["slimfront.reason"]
    assert reason == f"stopped early after {RUNG} epochs"
