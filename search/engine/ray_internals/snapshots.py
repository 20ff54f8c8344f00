"""Ray Tune without its own state on disk: a search is resumed from its journal alone.

What Ray Tune would write of an experiment has the config of each trial as it is, with the secrets
that factories were given and the keys of a bucket; it grows with the trials; and a disk that takes
no more of it would end a search that does not need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import tune
from ray.tune.impl.tuner_internal import TunerInternal

from slimfront.search.engine.ray_internals.controller import Controller


class _NoAnalysis:
    """In the place of what Ray Tune reads back of an experiment when it is over."""

    def __init__(self, **_: Any) -> None:
        self.trials: list[Any] = []


@contextmanager
def without_snapshots() -> Iterator[None]:
    """Within, experiments leave checkpoints of their trials, and nothing else that says what was
    run (Ray 2.60 has no switch for that)."""
    before = tune.ExperimentAnalysis, TunerInternal.__getstate__, Controller.checkpoint
    tune.ExperimentAnalysis = _NoAnalysis
    TunerInternal.__getstate__ = lambda _: {}  # tuner.pkl
    Controller.checkpoint = lambda *_, **__: None
    try:
        yield
    finally:
        tune.ExperimentAnalysis, TunerInternal.__getstate__, Controller.checkpoint = before
