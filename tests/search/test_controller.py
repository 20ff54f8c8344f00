"""Processes that take longer to start than a trial takes."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from slimfront.search.engine.runner import run_search
from slimfront.trainables.trainable import CandidateTrainable
from tests.conftest import small_config

START_S = 2.0


def slow_to_start(directory: Path) -> type[CandidateTrainable]:
    """Trains in a process that leaves its number in `directory`; all but the first take long to
    start."""

    class SlowToStart(CandidateTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            if any(directory.iterdir()) and not (directory / str(os.getpid())).exists():
                time.sleep(START_S)
            (directory / str(os.getpid())).touch()
            super().setup(config)

        def step(self) -> dict[str, Any]:
            with (directory / str(os.getpid())).open("a") as file:
                file.write("step\n")
            return super().step()

    return SlowToStart


@pytest.mark.usefixtures("ray_session")
def test_a_process_that_starts_is_waited_for_although_another_could_take_its_trial(
    tmp_path: Path,
) -> None:
    processes = tmp_path / "processes"
    processes.mkdir()
    config = small_config(
        tmp_path,
        resources={"pack": 1},
        search={"trials": 30, "sampler": "random"},
        training={"epochs": 8, "report_every": 8},
    )
    result = run_search(config, trainable=slow_to_start(processes))
    steps = [len(file.read_text().splitlines()) for file in processes.iterdir()]
    assert sum(steps) == len(result.ledger.trials) + 1
    assert len(steps) == 2
    assert min(steps) > 2
