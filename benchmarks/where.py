"""Where the core-seconds of a trial go: clocks around functions of the driver and of the processes
that train."""

import functools
import importlib
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from benchmarks.common import Outcome
from benchmarks.cores import Cores
from slimfront.search.config.schema import Config
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.trainable import CandidateTrainable

_FOLDER, _SLOTS = "SLIMFRONT_CLOCKS", "SLIMFRONT_SLOTS"
_WARM = 6

TRIAL = {
    "slimfront.trainables.training.loop:Training.__init__": (
        "network, optimiser and penalties are made"
    ),
    "slimfront.trainables.training.loop:Training.run_epoch": "epochs: order of batches, metrics",
    "slimfront.trainables.training.batch_step:BatchStep.train_batch": (
        "steps: batches, schedule, bookkeeping"
    ),
    "slimfront.trainables.training.losses:Losses.forward": "steps: forward",
    "torch:Tensor.backward": "steps: backward",
    "slimfront.trainables.training.batch_step:take_step": "steps: optimiser",
    "slimfront.trainables.penalties.base:ActiveGroups.proximal": "steps: penalties",
    "slimfront.trainables.packs.pack:Pack.run_epoch": "epochs: order of batches, metrics",
    "slimfront.trainables.packs.pack:Pack._steps": "steps: batches, schedule, bookkeeping",
    "slimfront.trainables.packs.pack:Pack._scores": "validation",
    "slimfront.trainables.packs.pack:Stack": "packs are put together",
    "slimfront.trainables.packs.step:Step.losses": "steps: forward",
    "torch.autograd:grad": "steps: backward",
    "slimfront.trainables.packs.optimizers:Update.__call__": "steps: optimiser",
    "slimfront.trainables.packs.step:Step.proximal": "steps: penalties",
    "slimfront.trainables.packs.step:Step.shrink_entries": "steps: penalties",
    "slimfront.trainables.sparsifiers.base:ActiveSparsifier.before_step": "steps: sparsifier",
    "slimfront.trainables.sparsifiers.base:ActiveSparsifier.after_step": "steps: sparsifier",
    "slimfront.trainables.tasks.active:ActiveTask.state": "validation",
    "slimfront.trainables.training.finishing:Finishing.finish": "one-shot pruning",
    "slimfront.trainables.training.finishing:compact": "compaction",
    "slimfront.trainables.compaction.compact:measure": "measures",
    "slimfront.trainables.trainable:store": "networks to plain data",
    "slimfront.trainables.trainable:CandidateTrainable.step": "candidate read, report put together",
    "slimfront.trainables.trainable:CandidateTrainable._start": (
        "candidate read, report put together"
    ),
    "slimfront.trainables.trainable:CandidateTrainable.save_checkpoint": "checkpoints written",
    "ray.tune:Trainable.train": "Ray's part of a report",
    "ray.tune:Trainable._report_class_trainable_checkpoint": "checkpoints copied by Ray",
}
DRIVER = {
    "ray.tune.execution.tune_controller:TuneController.step": "Tune's event loop",
    "ray.tune.execution.tune_controller:TuneController.checkpoint": (
        "Tune's snapshots of the experiment"
    ),
    "ray.tune.execution.tune_controller:TuneController.on_step_end": "Tune's event loop",
    "ray.air.execution._internal.actor_manager:RayActorManager.next": "Ray's messages",
    "slimfront.search.engine.searcher:StudySearcher.suggest": "Optuna suggests",
    "slimfront.search.engine.searcher:StudySearcher.tell": "Optuna is told",
    "slimfront.search.record.journal:Journal.append": "journal",
    "slimfront.search.engine.observer:Observer.on_trial_start": "records",
    "slimfront.search.engine.observer:Observer.on_trial_result": "records",
    "slimfront.search.engine.observer:Observer.on_checkpoint": "records",
    "slimfront.search.engine.observer:Observer.on_trial_complete": "records",
    "slimfront.search.tracking.recorder:Recorder._take_in": "MLflow",
    "slimfront.search.tracking.recorder:Recorder._write": "MLflow",
}


def owner_of(place: str) -> tuple[Any, str]:
    """What a function such as `module:Class.method` is an attribute of, and by which name; raises
    AttributeError where it is not there."""
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    getattr(owner, name)
    return owner, name


class Clocks:
    """Core-seconds of functions by label, each without those that it calls and that have a clock of
    their own."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.spent: Counter[str] = Counter()
        self.inside = threading.local()
        for place, label in labels.items():
            owner, name = owner_of(place)
            setattr(owner, name, self._timed(getattr(owner, name), label))

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            outer, begun = getattr(self.inside, "spent", 0.0), time.thread_time()
            self.inside.spent = 0.0
            try:
                return function(*args, **options)
            finally:
                taken = time.thread_time() - begun
                self.spent[label] += taken - self.inside.spent
                self.inside.spent = outer + taken

        return timed


class Clocked(CandidateTrainable):
    """The trainable with clocks, which writes down what they show at the end of each trial but the
    first of each slot."""

    clocks: Clocks | None = None
    ended = 0
    """Trials of this process: a pack has many trainables in one."""

    def setup(self, config: dict[str, Any]) -> None:
        """Starts the clocks."""
        if Clocked.clocks is None:
            Clocked.clocks = Clocks(TRIAL)
        super().setup(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """A trial has ended."""
        assert Clocked.clocks is not None
        Clocked.ended += 1
        first = int(os.environ[_SLOTS])
        if Clocked.ended == first:
            Clocked.before = Counter(Clocked.clocks.spent)
            Clocked.began = time.process_time()
        elif Clocked.ended > first:
            spent = Clocked.clocks.spent - Clocked.before
            spent["Ray's worker: messages, threads"] = (
                time.process_time() - Clocked.began - sum(spent.values())
            )
            file = Path(os.environ[_FOLDER], f"{os.getpid()}.json")
            file.write_text(json.dumps({"trials": Clocked.ended - first, "spent": spent}))
        return super().reset_config(new_config)


class Marks(Progress):
    """What the driver and Ray had spent when the last trial ended, since the warm-up."""

    def __init__(self, cores: Cores, clocks: Clocks, warm: int) -> None:
        """The first `warm` trials to end are the warm-up."""
        self.cores, self.clocks, self.warm = cores, clocks, warm
        self.ends: list[tuple[Counter[str], Counter[str]]] = []

    def update(self, ledger: Ledger) -> None:
        """Called at each event."""
        if sum(trial.status != "running" for trial in ledger.trials) > len(self.ends):
            self.ends.append((Counter(self.clocks.spent), self.cores.look()))

    def per_trial(self) -> tuple[dict[str, float], dict[str, float]]:
        """Core-seconds by clock, and by kind of process."""
        (first, first_kinds), (last, last_kinds) = self.ends[self.warm - 1], self.ends[-1]
        count = len(self.ends) - self.warm
        return (
            {name: (last[name] - first[name]) / count for name in last},
            {kind: (last_kinds[kind] - first_kinds[kind]) / count for kind in last_kinds},
        )


def where(config: Callable[[int, Path], Config], trials: int, bare_seconds: float) -> Outcome:
    """The table of one search of so many trials, each part also in units of the bare loop's
    core-seconds."""
    clocks = Clocks(DRIVER)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        planned = config(trials, Path(folder))
        slots = planned.resources.pack if isinstance(planned.resources.pack, int) else 1
        os.environ[_FOLDER], os.environ[_SLOTS] = folder, str(slots)
        cores = Cores()
        start_local_ray()
        marks = Marks(cores, clocks, warm=max(_WARM, 2 * slots))
        run_search(planned, marks, trainable=Clocked)
        cores.close()
        ray.shutdown()
        workers = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    count = sum(worker["trials"] for worker in workers)
    names = list(dict.fromkeys([*TRIAL.values(), "Ray's worker: messages, threads"]))
    in_trials = {name: sum(w["spent"].get(name, 0.0) for w in workers) / count for name in names}
    in_driver, kinds = marks.per_trial()
    in_driver["other threads of the driver"] = kinds["driver"] - sum(in_driver.values())
    parts = [("trial", n, s) for n, s in in_trials.items()] + [
        ("driver", n, s) for n, s in in_driver.items()
    ]
    parts.append(("Ray", "its own processes", kinds["Ray"]))
    total = sum(seconds for _, _, seconds in parts)
    rows = [
        _row(*part, total, bare_seconds)
        for part in sorted(parts, key=lambda part: -part[2])
        if part[2] > 5e-5
    ]
    return Outcome(1, [*rows, _row("", "together", total, total, bare_seconds)], [])


def _row(
    process: str, part: str, seconds: float, total: float, bare_seconds: float
) -> dict[str, str]:
    return {
        "process": process,
        "part": part,
        "core-milliseconds per trial": f"{1000 * seconds:.1f}",
        "share": f"{seconds / total:.1%}",
        "of the bare loop": f"{seconds / bare_seconds:.3f}",
    }
