"""What a search gets for its epochs, judged by what ships: ours, its parts switched off one by one,
and what a user would assemble."""

import argparse
import logging
import math
import statistics
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks import search_moasha
from benchmarks.common import KEEP, Goal, Kept, Outcome, at_most, run, spread
from benchmarks.curves import THIRD
from slimfront import train
from slimfront.search.config.loading import load
from slimfront.search.config.samplers import SAMPLERS
from slimfront.search.config.schema import Config
from slimfront.search.engine import runner
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.searcher import StudySearcher
from slimfront.search.record.events import (
    CheckpointMoved,
    EpochsReported,
    Event,
    NetworkMeasured,
    NetworkTested,
    OfTrial,
    SearchBegan,
    TrialBegan,
    TrialEnded,
)
from slimfront.search.record.journal import JOURNAL_FILE, read_events
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import TrialRecord
from slimfront.trainables.data import load_once

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
TOLERANCES = (0.01, 0.02)
TRIALS = 24


@dataclass(frozen=True)
class Variant:
    """One way to search."""

    sampler: str = "tpe"
    stopping: bool = True
    one_shot: bool = True
    """Whether networks that one-shot pruning makes of a trained one are candidates too."""
    refine: bool = True
    """Whether one-shot pruning closes in on the tolerance."""
    candidates: bool = True
    """Whether every checkpoint is a candidate, or a trial's last network only."""
    told: bool = True
    """Whether Optuna hears of the networks of trials that were stopped early."""
    tolerance: float = 0.01
    """1: everything is in the region that matters."""


OURS = "ours"
ASSEMBLED = "Ray Tune + OptunaSearch, no stopping"
VARIANTS: dict[str, Variant] = {
    OURS: Variant(),
    "ours, tolerance off": Variant(tolerance=1.0),
    "ours, one-shot pruning not refined": Variant(refine=False),
    "ours without early stopping": Variant(stopping=False),
    "ours without checkpoints as candidates": Variant(candidates=False),
    "ours without one-shot pruning": Variant(one_shot=False),
    "ours without any of the three": Variant(stopping=False, one_shot=False, candidates=False),
    "random, without any of the three": Variant(
        "random", stopping=False, one_shot=False, candidates=False
    ),
    "ours, stopped trials not told": Variant(told=False),
    "ours with multivariate tpe": Variant("{name: tpe, multivariate: true}"),
    **{f"ours with {name}": Variant(name) for name in SAMPLERS if name != "tpe"},
}


def config_of(job: Path, variant: Variant, seed: int, trials: int, directory: Path) -> Config:
    """The config of a job, searched in that way."""
    # Stopped trials are short: twice as many of them cost about as much.
    trials *= 2 if variant.stopping else 1
    wanted = [
        f"search.sampler={variant.sampler}",
        f"search.seed={seed}",
        f"search.trials={trials}",
        f"search.early_stopping={'true' if variant.stopping else 'false'}",
        f"search.storage_path={directory}",
        f"tolerance={variant.tolerance}",
        "training.report_every=3",
        f"tracking.uri=sqlite:///{directory}/mlflow.db",
    ]
    if not variant.refine:
        wanted.append("one_shot.refine=0")
    return load(job, wanted)


class Untold(StudySearcher):
    """Tells Optuna that trials which were stopped early have failed."""

    def tell(self, record: TrialRecord) -> None:
        """As the searcher does, but for those."""
        failed = TrialRecord(record.number, record.values, record.seed, "failed", "stopped early")
        super().tell(failed if record.status == "stopped" else record)


@dataclass
class Found:
    """What a search had found, as its epochs were spent."""

    smallest: dict[float, list[tuple[int, float]]] = field(default_factory=dict)
    """By tolerance: (epochs spent, share of the dense network's non-zero weights) of the smallest
    network within it."""
    tested: dict[float, float] = field(default_factory=dict)
    """By tolerance: the test accuracy of the last of them, where it was taken."""
    hypervolume: float = 0.0
    """Of the whole front, at the end."""

    def as_plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "smallest": list(self.smallest.items()),
            "tested": list(self.tested.items()),
            "hypervolume": self.hypervolume,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Found":
        """What `as_plain` made."""
        smallest = {}
        for tolerance, steps in plain["smallest"]:
            smallest[tolerance] = [(spent, share) for spent, share in steps]
        return cls(smallest, dict(map(tuple, plain["tested"])), plain["hypervolume"])

    def at(self, tolerance: float, epochs: float) -> float:
        """The share of the smallest network within a tolerance after so many epochs; infinite where
        there is none."""
        found = [share for spent, share in self.smallest[tolerance] if spent <= epochs]
        return min(found, default=math.inf)


def found_by(
    events: Iterable[Event], config: Config, baseline: dict[str, float], sizes: dict[str, float]
) -> Found:
    """What the events of a search's trials tell, beside a trained baseline with these measures."""
    found = Found()
    ledgers = {}
    for tolerance in TOLERANCES:
        ledgers[tolerance] = Ledger(config.chosen_objectives(), sizes, tolerance=tolerance)
        ledgers[tolerance].apply(TrialBegan(number=None, values={}, seed=0))
        ledgers[tolerance].apply(
            NetworkMeasured(number=None, epoch=0, measures=baseline, compaction=[], checkpoint=None)
        )
        found.smallest[tolerance] = []
    spent = 0
    for event in events:
        if isinstance(event, EpochsReported):
            spent += len(event.history)
        for tolerance, ledger in ledgers.items():
            ledger.apply(event)
            best = ledger.front.recommended()
            if best is not None and ledger.region.is_near(best):
                share = best.measures["nonzero_params"] / baseline["nonzero_params"]
                found.smallest[tolerance].append((spent, share))
                test = (best.tested or {}).get("test_accuracy")
                if test is not None:
                    found.tested[tolerance] = test
            found.hypervolume = ledger.front.hypervolume_full()
    return found


def shown_events(events: Sequence[Event], variant: Variant) -> list[Event]:
    """The events of the trials, without what a variant does not take for candidates."""
    shown: list[Event] = []
    waiting: dict[int | None, Event] = {}
    for event in events:
        if not isinstance(event, OfTrial) or event.number is None:
            continue
        if isinstance(event, CheckpointMoved):
            continue
        if isinstance(event, NetworkTested) and not (variant.candidates and variant.one_shot):
            continue
        if isinstance(event, NetworkMeasured):
            kept: Event = event
            if not variant.one_shot:
                kept = event.model_copy(update={"pruned": []})
            if not variant.candidates:
                waiting[event.number] = kept
                continue
            shown.append(kept)
            continue
        if isinstance(event, TrialEnded) and event.number in waiting:
            shown.append(waiting.pop(event.number))
        shown.append(event)
    return shown


def baseline_of(events: Sequence[Event]) -> tuple[dict[str, float], dict[str, float]]:
    """The measures of a search's trained baseline, and those of the untrained one."""
    sizes = next(event.dense_sizes for event in events if isinstance(event, SearchBegan))
    measured = [event for event in events if isinstance(event, NetworkMeasured)]
    trained = [event.measures for event in measured if event.number is None]
    return trained[-1], sizes


def searched(job: Path, variant: Variant, seed: int, trials: int) -> tuple[list[Event], Config]:
    """The journal of a search of ours."""
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(job, variant, seed, trials, Path(directory))
        with patch.object(runner, "StudySearcher", StudySearcher if variant.told else Untold):
            runner.run_search(config, name="quality")
        return list(read_events(Path(directory, "quality", JOURNAL_FILE))), config


def assembled(job: Path, seed: int, trials: int, config: Config) -> list[Event]:
    """Ray Tune with OptunaSearch on two objectives, a function trainable, and nothing else; as
    events of ours."""
    base = load(job, ["one_shot.steps=0"])
    epochs = config.training.epochs

    def trainable(values: dict[str, Any]) -> None:
        number = zlib.crc32(repr(sorted(values.items())).encode())  # a training seed of its own
        candidate = base.candidate(values)
        options = candidate.training.model_copy(update={"seed": number})
        trained = train(candidate.model_copy(update={"training": options}))
        data = load_once(base.data, torch.device("cpu"), base.task)
        network = trained.compacted.network
        tested = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
        tune.report({**trained.measures, **tested})

    ended: list[dict[str, Any]] = []

    class Remember(tune.Callback):
        def on_trial_complete(
            self,
            iteration: int,  # noqa: ARG002
            trials: list[Any],  # noqa: ARG002
            trial: Any,
            **info: Any,  # noqa: ARG002
        ) -> None:
            ended.append(dict(trial.last_result))

    searcher = OptunaSearch(
        config.distributions(),
        metric=[objective.name for objective in config.chosen_objectives()],
        mode=["max", "min"],
        seed=seed,
        study_name=f"assembled-{seed}",
    )
    with tempfile.TemporaryDirectory() as directory:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=trials, max_concurrent_trials=2
            ),
            run_config=tune.RunConfig(
                storage_path=directory, name="assembled", verbose=0, callbacks=[Remember()]
            ),
        ).fit()
    events: list[Event] = []
    for number, result in enumerate(ended):
        measures = {name: value for name, value in result.items() if isinstance(value, float | int)}
        events += [
            TrialBegan(number=number, values={}, seed=0),
            EpochsReported(number=number, history=[{"epoch": n + 1} for n in range(epochs)]),
            NetworkMeasured(
                number=number, epoch=epochs, measures=measures, compaction=[], checkpoint=None
            ),
            NetworkTested(
                number=number,
                epoch=epochs,
                step=0,
                metrics={"test_accuracy": result["test_accuracy"]},
            ),
        ]
    return events


def rows_of(found: dict[str, list[Found]], budget: int) -> list[dict[str, Any]]:
    """The table: a row for each search, judged at a third of its epochs and at their end."""
    rows = []
    for name, per_seed in found.items():
        row: dict[str, Any] = {"search": name}
        for tolerance in TOLERANCES:
            within = f"within {100 * tolerance:.0f} point{'s' * (tolerance > 0.01)}"
            for share in (THIRD, 1):
                sizes = [one.at(tolerance, share * budget) for one in per_seed]
                row[f"{within}, at {share:.0%}"] = _median(sizes)
            tested = [one.tested[tolerance] for one in per_seed if tolerance in one.tested]
            row[f"its test accuracy, {within}"] = spread(tested, 4) if tested else "none"
        row["hypervolume_full"] = spread([one.hypervolume for one in per_seed], 4)
        rows.append(row)
    return rows


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def goals_of(found: dict[str, list[Found]], budget: int) -> list[Goal]:
    """Ours against the assembled stack at its end, seed by seed, within one point."""
    tolerance = TOLERANCES[0]
    goals = []
    for share, wanted in ((THIRD, 1.0), (1, 0.7)):
        ratios = []
        for ours, theirs in zip(found[OURS], found[ASSEMBLED], strict=True):
            ratios.append(ours.at(tolerance, share * budget) / theirs.at(tolerance, budget))
        name = f"size at {share:.0%} of the epochs over the assembled stack's at the end (median)"
        goals.append(at_most(name, statistics.median(ratios), wanted))
    return goals


def others() -> list[str]:
    """The searches that are not ours, and can be run here."""
    if search_moasha.PYTHON.exists():
        return [ASSEMBLED, search_moasha.NAME]
    print(f"{search_moasha.NAME} is left out: `make peers` sets it up", file=sys.stderr)
    return [ASSEMBLED]


def _found_with(
    job: Path, seed: int, names: Sequence[str], trials: int, kept: Kept
) -> dict[str, Found]:
    """What each search finds with one seed, by its name; what was kept is not searched again."""
    runs: dict[Variant, tuple[list[Event], Config]] = {}

    def run_of(variant: Variant) -> tuple[list[Event], Config]:
        # What the sampler and early stopping see is the network that was trained: what else counts
        # as a candidate changes nothing of how the search goes, only what it finds.
        same = replace(variant, candidates=True, one_shot=True)
        if same not in runs:
            runs[same] = searched(job, same, seed, trials)
        return runs[same]

    found = {}
    for name in (*names, *others()):
        key = f"{name}; {seed}; {trials}"
        if key not in kept.results:
            variant = VARIANTS.get(name, VARIANTS[OURS])
            events, config = run_of(variant)
            baseline, sizes = baseline_of(events)
            events = shown_events(events, variant)
            if name == ASSEMBLED:
                events = assembled(job, seed, trials, config)
            elif name == search_moasha.NAME:
                events = search_moasha.searched_by_moasha(job, seed, trials, config)
            kept.put(key, found_by(events, config, baseline, sizes).as_plain())
        found[name] = Found.from_plain(kept.results[key])
    return found


def search_quality(arguments: argparse.Namespace) -> Outcome:
    """The smallest network within one and two points of dense over epochs spent, on the main job,
    as a share of the dense network's non-zero weights (median and range)."""
    seeds, names, trials = arguments.seeds, list(VARIANTS), TRIALS
    if arguments.only:
        names = [OURS, *(name for name in names if name in arguments.only)]
    if arguments.quick:
        seeds, names, trials = 1, [OURS], 4
    found = compared(CONFIG, seeds, names, trials, Kept(arguments.keep))
    budget = trials * load(CONFIG).training.epochs
    return Outcome(seeds, rows_of(found, budget), goals_of(found, budget))


def compared(
    job: Path, seeds: int, names: Sequence[str], trials: int, kept: Kept
) -> dict[str, list[Found]]:
    """What each search of a config finds, by its name, seed by seed; those of others first."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    start_local_ray()
    found: dict[str, list[Found]] = {name: [] for name in (*others(), *names)}
    for seed in range(seeds):
        for name, one in _found_with(job, seed, names, trials, kept).items():
            found[name].append(one)
    ray.shutdown()
    return found


if __name__ == "__main__":
    run(
        "search_quality",
        search_quality,
        ("--seeds", {"type": int, "default": 5}),
        ("--only", {"action": "append", "help": "a search of the table beside ours; repeatable"}),
        KEEP,
    )
