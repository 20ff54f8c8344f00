"""A search by Syne Tune's MOASHA on the same trainable as ours: two trials at a time, which report
their network as it would ship."""

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from slimfront.search.config.loading import load
from slimfront.search.config.schema import Config
from slimfront.search.record.events import (
    Ending,
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworkTested,
    TrialBegan,
    TrialEnded,
)
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.training.loop import Training

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-syne" / "bin" / "python"
NAME = "Syne Tune, MOASHA"
AT_ONCE = 2
EVERY = 3
"""A network is reported after so many epochs, as ours are."""


class Moasha:
    """Syne Tune's scheduler, in a process of an environment of its own (`make peers`)."""

    def __init__(self, config: Config, seed: int) -> None:
        epochs = config.training.epochs
        settings = {
            "seed": seed,
            "space": [_described(*one) for one in config.distributions().items()],
            "metrics": ["error", "nonzero_params"],
            "most": epochs,
            "grace": math.ceil(0.3 * epochs),  # as ours
        }
        self.process = subprocess.Popen(
            [PYTHON, ROOT / "benchmarks" / "peers" / "moasha.py", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, *line: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def suggest(self, number: int) -> dict[str, Any]:
        """The values of a new trial."""
        values: dict[str, Any] = self._ask("suggest", number)
        return values

    def goes_on(self, number: int, measures: dict[str, float], epoch: int) -> bool:
        """Whether a trial goes on that has a network with these measures after an epoch."""
        results = {
            "error": 1 - measures["val_accuracy"],
            "nonzero_params": measures["nonzero_params"],
            "epoch": epoch,
        }
        return bool(self._ask("result", number, results) == "CONTINUE")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def _described(path: str, distribution: BaseDistribution) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"path": path, "choices": list(distribution.choices)}
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return {
        **{"path": path, "choices": None, "low": distribution.low, "high": distribution.high},
        **{"log": distribution.log, "whole": isinstance(distribution, IntDistribution)},
    }


@contextmanager
def moasha(config: Config, seed: int) -> Iterator[Moasha]:
    """The scheduler, until it is needed no more."""
    scheduler = Moasha(config, seed)
    try:
        yield scheduler
    finally:
        scheduler.close()


@ray.remote(num_cpus=1)
class Worker:
    """Trains one candidate after another."""

    def begin(self, candidate: Candidate) -> None:
        """The next one."""
        torch.set_num_threads(1)
        self.training = Training(candidate, "cpu")

    def report(self) -> tuple[list[dict[str, Any]], dict[str, float], float]:
        """Some more epochs: their metrics, the measures of the network as it would ship, and its
        test accuracy."""
        training = self.training
        history: list[dict[str, Any]] = []
        while not training.done and len(history) < EVERY:
            history.append(training.run_epoch())
        finished = training.finish(one_shot=False)
        data = load_once(training.candidate.data, torch.device("cpu"), training.candidate.task)
        network = finished.compacted.network
        tested = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
        return history, dict(finished.measures), tested["test_accuracy"]


def searched_by_moasha(job: Path, seed: int, trials: int, config: Config) -> list[Event]:
    """What happens in a search of so many trials, as events of ours; many stop early, so that twice
    as many are begun, as in ours."""
    base = load(job, ["one_shot.steps=0"])
    left = list(range(2 * trials))
    workers = [Worker.remote() for _ in range(AT_ONCE)]  # type: ignore[attr-defined]
    events: list[Event] = []
    busy: dict[Any, tuple[Any, int]] = {}
    with moasha(config, seed) as scheduler:

        def begin(worker: Any) -> None:
            if not left:
                return
            number = left.pop(0)
            candidate = base.candidate(scheduler.suggest(number))
            options = candidate.training.model_copy(update={"seed": 1000 * seed + number})
            worker.begin.remote(candidate.model_copy(update={"training": options}))
            events.append(TrialBegan(number=number, values={}, seed=0))
            busy[worker.report.remote()] = worker, number

        for worker in workers:
            begin(worker)
        while busy:
            (done,), _ = ray.wait(list(busy))
            worker, number = busy.pop(done)
            history, measures, tested = ray.get(done)
            epoch = int(history[-1]["epoch"])
            events += [
                EpochsReported(number=number, history=history),
                NetworkMeasured(
                    number=number, epoch=epoch, measures=measures, compaction=[], checkpoint=None
                ),
                NetworkTested(
                    number=number, epoch=epoch, step=0, metrics={"test_accuracy": tested}
                ),
            ]
            over = epoch >= config.training.epochs
            if not over and scheduler.goes_on(number, measures, epoch):
                busy[worker.report.remote()] = worker, number
                continue
            status: Ending = "completed" if over else "stopped"
            events.append(TrialEnded(number=number, status=status, reason=None))
            begin(worker)
    for worker in workers:
        ray.kill(worker)
    return events
