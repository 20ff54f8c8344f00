"""How much front a search gets for its epochs: ours, its parts switched off one by one, and what a user would assemble."""

import argparse
import logging
import statistics
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.common import Goal, Outcome, at_most, run, spread
from search.config import Config, load
from search.journal import JOURNAL_FILE, Event, read_events
from search.records import Ledger
from search.runner import run_search, start_local_ray
from search.samplers import SAMPLERS
from trainables import train

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
THIRD = 1 / 3

Curve = list[tuple[int, float]]
"""(epochs spent, hypervolume), rising in both."""


@dataclass(frozen=True)
class Variant:
    """One way to search. `stopping` and `candidates` are what sets ours apart."""

    sampler: str = "tpe"
    stopping: bool = True
    candidates: bool = True
    """Whether every checkpoint is a candidate, or a trial's last network only."""


OURS = "ours"
ASSEMBLED = "Ray Tune + OptunaSearch, no stopping"
VARIANTS: dict[str, Variant] = {
    OURS: Variant(),
    "ours without early stopping": Variant(stopping=False),
    "ours without checkpoints as candidates": Variant(candidates=False),
    "random, no stopping, last networks only": Variant("random", stopping=False, candidates=False),
    **{f"ours with {name}": Variant(name) for name in SAMPLERS if name != "tpe"},
}


def config_of(variant: Variant, seed: int, trials: int, directory: Path) -> Config:
    """The main job's config, searched in that way."""
    stopping = "true" if variant.stopping else "false"
    wanted = [f"search.sampler={variant.sampler}", f"search.seed={seed}", f"search.trials={trials}"]
    wanted += [f"search.early_stopping={stopping}", f"search.storage_path={directory}", "training.report_every=3"]
    return load(CONFIG, [*wanted, f"tracking.uri=sqlite:///{directory}/mlflow.db"])


def curve_of(events: list[Event], config: Config, *, candidates: bool) -> Curve:
    """The curve that the journal of a search tells; the dense reference does not count."""
    curve, spent = Curve(), 0
    shown = Ledger(config.chosen_objectives(), events[0]["dense_sizes"])
    waiting: dict[int, Event] = {}
    for event in events:
        if event.get("number", 0) is None:
            continue
        kind = event["event"]
        if kind == "epochs":
            spent += len(event["history"])
        if kind == "point" and not candidates:
            waiting[event["number"]] = event
            continue
        if kind == "ended" and event["number"] in waiting:
            shown.apply(waiting.pop(event["number"]))
        shown.apply(event)
        curve.append((spent, shown.hypervolume()))
    return curve


def assembled(seed: int, trials: int, config: Config, dense_sizes: dict[str, float]) -> Curve:
    """Ray Tune with OptunaSearch on two objectives, a function trainable, and nothing else."""
    epochs = config.training.epochs

    def trainable(values: dict[str, Any]) -> None:
        number = zlib.crc32(repr(sorted(values.items())).encode())  # a training seed of its own
        candidate = config.candidate(values)
        options = candidate.training.model_copy(update={"seed": number})
        tune.report(dict(train(candidate.model_copy(update={"training": options})).measures))

    ended: list[dict[str, Any]] = []

    class Remember(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
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
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=trials, max_concurrent_trials=2),
            run_config=tune.RunConfig(storage_path=directory, name="assembled", verbose=0, callbacks=[Remember()]),
        ).fit()
    ledger, curve = Ledger(objectives, dense_sizes), Curve()
    for number, measures in enumerate(ended):
        ledger.apply({"event": "trial", "number": number, "values": {}, "seed": 0})
        taken = {o.name: measures[o.name] for o in objectives}
        ledger.apply(
            {"event": "point", "number": number, "epoch": epochs, "measures": taken, "compaction": [], "checkpoint": None}
        )
        curve.append(((number + 1) * epochs, ledger.hypervolume()))
    return curve


def at(curve: Curve, epochs: int) -> float:
    """The hypervolume after so many epochs."""
    return max((volume for spent, volume in curve if spent <= epochs), default=0.0)


def reached(curve: Curve, volume: float) -> float:
    """The epochs at which a hypervolume was reached; infinite if never."""
    return min((float(spent) for spent, seen in curve if seen >= volume), default=float("inf"))


def search_quality(arguments: argparse.Namespace) -> Outcome:
    """Hypervolume over epochs on the main job, at equal budgets."""
    seeds, trials = (1, 4) if arguments.quick else (arguments.seeds, 24)
    names = list(VARIANTS)[:2] if arguments.quick else list(VARIANTS)
    logging.getLogger("ray").setLevel(logging.ERROR)
    start_local_ray()
    curves: dict[str, list[Curve]] = {name: [] for name in (ASSEMBLED, *names)}
    budget = 0
    runs: dict[tuple[Variant, int], tuple[list[Event], Config]] = {}
    for seed in range(seeds):
        for name in names:
            variant = VARIANTS[name]
            key = (Variant(variant.sampler, variant.stopping), seed)
            if key not in runs:
                with tempfile.TemporaryDirectory() as directory:
                    # Stopped trials are short: four times as many of them cost about as much.
                    config = config_of(variant, seed, trials * (4 if variant.stopping else 1), Path(directory))
                    run_search(config, name="quality")
                    runs[key] = list(read_events(Path(directory, "quality", JOURNAL_FILE))), config
            events, config = runs[key]
            curves[name].append(curve_of(events, config, candidates=variant.candidates))
            budget = trials * config.training.epochs
        curves[ASSEMBLED].append(assembled(seed, trials, config, events[0]["dense_sizes"]))
    ray.shutdown()
    rows = []
    for name, per_seed in curves.items():
        needed = [reached(curve, at(other, budget)) / budget for curve, other in zip(per_seed, curves[ASSEMBLED], strict=True)]
        rows.append(
            {
                "search": name,
                **{
                    f"hypervolume at {share:.0%}": spread([at(c, int(share * budget)) for c in per_seed], 4)
                    for share in (THIRD, 1)
                },
                "share of the epochs to the assembled stack's last": (
                    f"{statistics.median(needed):.2f} ({min(needed):.2f} to {max(needed):.2f})"
                ),
            }
        )
    ours = [reached(c, at(o, budget)) / budget for c, o in zip(curves[OURS], curves[ASSEMBLED], strict=True)]
    goals: list[Goal] = [
        at_most("share of the assembled stack's epochs that ours needs (median)", statistics.median(ours), THIRD)
    ]
    return Outcome(seeds, rows, goals)


if __name__ == "__main__":
    run("search_quality", search_quality, ("--seeds", {"type": int, "default": 5}))
