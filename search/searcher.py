"""Optuna's suggestions for Ray Tune: asks the study for candidates and tells it how they ended.

Ray's own OptunaSearch leaves failed trials RUNNING in the study, merges searches that share a storage, and cannot say
why a trial failed; hence ours.
"""

import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from search.driver_only import DriverOnly

DENSE = "dense"
"""The role of the reference trial: the dense network, trained first and never told to Optuna."""


class InvalidCandidate(Exception):
    """A combination of values that makes no candidate; the message says why."""


class StudySearcher(DriverOnly, Searcher):
    """Asks `study` for every trial; the first suggestion is the dense reference.

    A suggestion is `make_config(number, values)`, where number is Optuna's and values are by dotted path; for the dense
    reference both are None. If it raises `InvalidCandidate`, the trial is told as failed, `on_invalid(number, values,
    reason)` is called, and the next one is asked for. A trial ends with a result that has every name of `objectives` (told
    as complete) or a `failure` (told as failed, with the reason as an attribute), or in an error (told as failed).
    """

    def __init__(
        self,
        study: optuna.Study,
        distributions: dict[str, optuna.distributions.BaseDistribution],
        objectives: list[str],
        make_config: Callable[[int | None, dict[str, Any] | None], dict[str, Any]],
        trials: int,
        on_invalid: Callable[[int, dict[str, Any], str], None] | None = None,
    ) -> None:
        super().__init__()
        self.study = study
        self.distributions = distributions
        self.objectives = objectives
        self.make_config = make_config
        self.remaining = trials
        self.on_invalid = on_invalid
        self.dense_suggested = False
        self.asked: dict[str, optuna.Trial] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Accepts what Tune passes on: the study knows its own objectives."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial, or FINISHED after the last."""
        if not self.dense_suggested:
            self.dense_suggested = True
            return self.make_config(None, None)
        while self.remaining > 0:
            self.remaining -= 1
            trial = self.study.ask(self.distributions)
            try:
                config = self.make_config(trial.number, trial.params)
            except InvalidCandidate as error:
                self._fail(trial, str(error))
                if self.on_invalid:
                    self.on_invalid(trial.number, trial.params, str(error))
                continue
            self.asked[trial_id] = trial
            return config
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study; every trial that was asked for ends COMPLETE or FAIL, never RUNNING."""
        trial = self.asked.pop(trial_id, None)
        if trial is None:  # the dense reference
            return
        values = [float((result or {}).get(name, math.nan)) for name in self.objectives]
        if not error and all(math.isfinite(value) for value in values):
            self.study.tell(trial, values)
            return
        reason = (result or {}).get("failure") or ("the trial raised" if error else "an objective is missing or not finite")
        self._fail(trial, str(reason))

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("failure", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def close(self) -> None:
        """Tells trials that never ended (the search was interrupted) as failed."""
        for trial in self.asked.values():
            self._fail(trial, "interrupted")
        self.asked.clear()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's own storage holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study's own storage holds the state."""
