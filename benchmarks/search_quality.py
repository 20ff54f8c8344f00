"""How much front a search gets for its epochs: ours, its parts switched off one by one, and what a
user would assemble."""

import argparse
import logging
import statistics
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.common import Goal, Outcome, at_most, run
from benchmarks.curves import THIRD, Curve, compare, shares
from slimfront import train
from slimfront.search.config.samplers import SAMPLERS
from slimfront.search.config.schema import Config, load
from slimfront.search.engine import runner
from slimfront.search.engine.nodes import start_local_ray
from slimfront.search.engine.searcher import StudySearcher
from slimfront.search.record.events import NetworkMeasured, TrialBegan
from slimfront.search.record.journal import JOURNAL_FILE, Event, read_events
from slimfront.search.record.ledger import Ledger, TrialRecord

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


@dataclass(frozen=True)
class Variant:
    """One way to search."""

    sampler: str = "tpe"
    stopping: bool = True
    one_shot: bool = True
    """Whether networks that one-shot pruning makes of a trained one are candidates too."""
    candidates: bool = True
    """Whether every checkpoint is a candidate, or a trial's last network only."""
    told: bool = True
    """Whether Optuna hears of the networks of trials that were stopped early."""


OURS = "ours"
ASSEMBLED = "Ray Tune + OptunaSearch, no stopping"
VARIANTS: dict[str, Variant] = {
    OURS: Variant(),
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


def config_of(variant: Variant, seed: int, trials: int, directory: Path) -> Config:
    """The main job's config, searched in that way."""
    stopping = "true" if variant.stopping else "false"
    wanted = [f"search.sampler={variant.sampler}", f"search.seed={seed}", f"search.trials={trials}"]
    wanted += [
        f"search.early_stopping={stopping}",
        f"search.storage_path={directory}",
        "training.report_every=3",
    ]
    return load(CONFIG, [*wanted, f"tracking.uri=sqlite:///{directory}/mlflow.db"])


class Untold(StudySearcher):
    """Tells Optuna that trials which were stopped early have failed."""

    def tell(self, record: TrialRecord) -> None:
        """As the searcher does, but for those."""
        failed = TrialRecord(record.number, record.values, record.seed, "failed", "stopped early")
        super().tell(failed if record.status == "stopped" else record)


def curve_of(events: list[Event], config: Config, variant: Variant) -> Curve:
    """The curve that the journal of a search tells; the dense reference does not count."""
    curve, spent = Curve(), 0
    shown = Ledger(config.chosen_objectives(), events[0]["dense_sizes"])
    waiting: dict[int, Event] = {}
    for event in events:
        if getattr(event, "number", None) is None or event.kind in ("tested", "moved"):
            continue
        kind = event.kind
        if kind == "epochs":
            spent += len(event.history)
        if not variant.one_shot:
            event = event | {"pruned": []}
        if kind == "point" and not variant.candidates:
            waiting[event.number] = event
            continue
        if kind == "ended" and event.number in waiting:
            shown.apply(waiting.pop(event.number))
        shown.apply(event)
        curve.append((spent, shown.hypervolume()))
    return curve


def assembled(seed: int, trials: int, config: Config, dense_sizes: dict[str, float]) -> Curve:
    """Ray Tune with OptunaSearch on two objectives, a function trainable, and nothing else."""
    epochs, base = config.training.epochs, load(CONFIG, ["one_shot.steps=0"])

    def trainable(values: dict[str, Any]) -> None:
        number = zlib.crc32(repr(sorted(values.items())).encode())  # a training seed of its own
        candidate = base.candidate(values)
        options = candidate.training.model_copy(update={"seed": number})
        tune.report(dict(train(candidate.model_copy(update={"training": options})).measures))

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

    objectives = config.chosen_objectives()
    searcher = OptunaSearch(
        config.distributions(),
        metric=[o.name for o in objectives],
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
    ledger, curve = Ledger(objectives, dense_sizes), Curve()
    for number, measures in enumerate(ended):
        ledger.apply(TrialBegan(number=number, values={}, seed=0))
        taken = {o.name: measures[o.name] for o in objectives}
        ledger.apply(
            NetworkMeasured(
                number=number, epoch=epochs, measures=taken, compaction=[], checkpoint=None
            )
        )
        curve.append(((number + 1) * epochs, ledger.hypervolume()))
    return curve


def search_quality(arguments: argparse.Namespace) -> Outcome:
    """Hypervolume over epochs on the main job, at equal budgets."""
    seeds, trials = (1, 4) if arguments.quick else (arguments.seeds, 24)
    names = list(VARIANTS)[:1] if arguments.quick else list(VARIANTS)
    logging.getLogger("ray").setLevel(logging.ERROR)
    start_local_ray()
    curves: dict[str, list[Curve]] = {name: [] for name in (ASSEMBLED, *names)}
    budget = 0
    runs: dict[tuple[Variant, int], tuple[list[Event], Config]] = {}
    for seed in range(seeds):
        for name in names:
            variant = VARIANTS[name]
            # What the sampler and early stopping see is the network that was trained: what else
            # counts as a candidate changes nothing of how the search goes, only what it finds.
            same = replace(variant, candidates=True, one_shot=True)
            if (same, seed) not in runs:
                with tempfile.TemporaryDirectory() as directory:
                    # Stopped trials are short: twice as many of them cost about as much.
                    config = config_of(
                        same, seed, trials * (2 if variant.stopping else 1), Path(directory)
                    )
                    with patch.object(
                        runner, "StudySearcher", StudySearcher if variant.told else Untold
                    ):
                        runner.run_search(config, name="quality")
                    runs[same, seed] = (
                        list(read_events(Path(directory, "quality", JOURNAL_FILE))),
                        config,
                    )
            events, config = runs[same, seed]
            curves[name].append(curve_of(events, config, variant))
            budget = trials * config.training.epochs
        curves[ASSEMBLED].append(assembled(seed, trials, config, events[0]["dense_sizes"]))
    ray.shutdown()
    share = statistics.median(shares(curves[OURS], curves[ASSEMBLED], budget))
    goals: list[Goal] = [
        at_most("share of the assembled stack's epochs that ours needs (median)", share, THIRD)
    ]
    return Outcome(seeds, compare(curves, ASSEMBLED, budget), goals)


if __name__ == "__main__":
    run("search_quality", search_quality, ("--seeds", {"type": int, "default": 5}))
