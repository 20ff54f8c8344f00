"""Processes that take longer to start than a trial takes."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from benchmarks.scale import Nothing
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.ray_internals.trial_actors import TrialActors
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.trainable import CandidateTrainable
from tests.conftest import small_config
from tests.search.clusters import wait_for

TRIALS = 4
"""The first process trains so many while the second starts."""


def slow_to_start(directory: Path) -> type[CandidateTrainable]:
    """Trains in a process that leaves its number in `directory`, with a line for each trial; the
    second has started when the first has trained some more."""

    def trained() -> int:
        return sum(len(file.read_text().splitlines()) for file in directory.iterdir())

    class SlowToStart(CandidateTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            if any(directory.iterdir()) and not (directory / str(os.getpid())).exists():
                enough = trained() + TRIALS
                wait_for(lambda: trained() >= enough, 60)
            (directory / str(os.getpid())).touch()
            super().setup(config)

        def step(self) -> dict[str, Any]:
            with (directory / str(os.getpid())).open("a") as file:
                file.write("trained\n")
            return super().step()

    return SlowToStart


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_process_that_starts_is_waited_for_although_another_could_take_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = TrialActors.get

    def get(self: TrialActors, trainable: type) -> Any:
        asked.append(real(self, trainable))
        return asked[-1]

    monkeypatch.setattr(TrialActors, "get", get)
    processes = tmp_path / "processes"
    processes.mkdir()
    config = small_config(
        tmp_path,
        resources={"pack": 1},
        search={"trials": 24, "sampler": "random", "concurrency": "auto"},
        training={"epochs": 8, "report_every": 8},
    )
    result = run_search(config, trainable=slow_to_start(processes))
    trained = [len(file.read_text().splitlines()) for file in processes.iterdir()]
    assert sum(trained) == len(result.ledger.trials) + 1
    assert len(trained) == 2
    assert min(trained) > 2
    # Of the processes that Ray began to start at once.
    assert {str(actor._default_options.get("runtime_env")) for actor in asked} == {"None"}


class Held(Progress):
    """How many trials Ray Tune holds at the most, when some have ended."""

    most = 0

    def update(self, ledger: Ledger) -> None:
        if len(ledger.trials) > 9:
            held = [thing for thing in gc.get_objects() if isinstance(thing, Trial)]
            self.most = max(self.most, len(held))


@pytest.mark.usefixtures("ray_session")
def test_trials_that_have_ended_are_let_go(tmp_path: Path) -> None:
    """Each would take a hundred kilobytes of the driver's memory until the search is over."""
    search = {"trials": 16, "sampler": "random", "concurrency": 2}
    config = small_config(tmp_path, resources={"pack": 1}, search=search)
    held = Held()
    result = run_search(config, held, trainable=Nothing)
    assert len(result.ledger.trials) >= 16
    assert 0 < held.most < 9


@pytest.mark.usefixtures("ray_session")
def test_trials_get_what_this_process_learned_after_it_had_started_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = TrialActors().get(CandidateTrainable)._default_options.get("runtime_env", {})
    assert "AWS_SESSION_TOKEN" not in before.get("env_vars", {})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
    given = TrialActors().get(CandidateTrainable)._default_options["runtime_env"]
    assert given["env_vars"]["AWS_SESSION_TOKEN"] == "new"
