"""Optuna's suggestions for Ray Tune: asks the study for candidates, and tells it how they ended.

Ray's own OptunaSearch leaves failed trials RUNNING in the study, merges searches that share a
storage, loses what it suggested when the driver dies, and cannot say why a trial failed; hence
ours.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from slimfront.search.config.objectives import Constraint
from slimfront.search.engine.driver_only import DriverOnly
from slimfront.search.record import optuna_internals
from slimfront.search.record.ledger import Ledger, TrialRecord, label
from slimfront.trainables.errors import UserError


class InvalidCandidate(Exception):
    """A combination of values that makes no candidate; the message says why."""


@dataclass(frozen=True)
class Unfinished:
    """A trial that an earlier session of the search left unfinished; it begins anew where there is
    no checkpoint."""

    number: int | None
    values: dict[str, Any]
    checkpoint: str | None = None


class StudySearcher(DriverOnly, Searcher):
    """Asks `study` for every trial, after what earlier sessions left unfinished; the first is the
    dense reference.

    A suggestion is `make_config(unfinished)`. If it raises `InvalidCandidate`,
    `on_invalid(number, values, reason)` is called and the next trial is asked for. Every trial that
    was asked for is told by `tell` when it has ended.

    Args:
        trials: in all, those of earlier sessions too.
        enough: asked before each new trial: whether to ask for no more.
        outside_region: by how much a network of that epoch, with these measures, misses the region
            that matters (see `Ledger.outside_region`): samplers prefer what does not.
        capacity: asked likewise: how many trials may be under way.
    """

    def __init__(
        self,
        study: optuna.Study,
        distributions: dict[str, BaseDistribution],
        objectives: Sequence[str],
        make_config: Callable[[Unfinished], dict[str, Any]],
        trials: int,
        *,
        constraints: Sequence[Constraint] = (),
        outside_region: Callable[[int, Mapping[str, Any]], float] = lambda _epoch, _measures: 0.0,
        unfinished: Sequence[Unfinished] = (Unfinished(None, {}),),
        on_invalid: Callable[[int, dict[str, Any], str], None] | None = None,
        enough: Callable[[], bool] = lambda: False,
        capacity: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        super().__init__()
        self.study = study
        self.distributions = distributions
        self.objectives = list(objectives)
        self.make_config = make_config
        self.constraints = constraints
        self.outside_region = outside_region
        self.unfinished = list(unfinished)
        self.on_invalid = on_invalid
        self.enough = enough
        self.capacity = capacity
        self.asked = {
            trial.number: optuna_internals.trial_id(trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.state in _BEGUN
        }
        self.remaining = max(trials - len(self.asked), 0)
        self.running: set[str] = set()

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accepts what Tune passes on: the study knows its own objectives."""
        return True

    @property
    def to_come(self) -> int:
        """At most so many suggestions are still to come."""
        return len(self.unfinished) + self.remaining

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial; None while there is no room, or others run and may have to
        begin again; then FINISHED."""
        if len(self.running) >= self.capacity():
            return None
        while (next_one := self._next()) is not None:
            try:
                config = self.make_config(next_one)
            except InvalidCandidate as error:
                if self.on_invalid and next_one.number is not None:
                    self.on_invalid(next_one.number, next_one.values, str(error))
                continue
            self.running.add(trial_id)
            return config
        if self.running:
            return None
        return str(Searcher.FINISHED)

    def _next(self) -> Unfinished | None:
        """What earlier sessions left, then what the study proposes, while there are to be more."""
        if self.unfinished:
            return self.unfinished.pop(0)
        if self.remaining and not self.enough():
            return self._ask()
        return None

    def _ask(self) -> Unfinished:
        self.remaining -= 1
        trial = self.study.ask(self.distributions)
        self.asked[trial.number] = optuna_internals.trial_id(trial)
        return Unfinished(trial.number, trial.params)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The trial does not run any more; it is told by `tell`, once its end is in the journal."""
        self.running.discard(trial_id)

    def again(self, record: TrialRecord) -> None:
        """Suggests a trial once more: its process was lost before it could begin."""
        self.unfinished.append(continued(record))

    def tell(self, record: TrialRecord) -> None:
        """Tells the study how a trial ended: COMPLETE with the objectives of its last network, or
        FAIL with the reason.

        A trial that was stopped early is told like one that completed: what the study learns of it
        is better than nothing.
        """
        if record.number is None:
            return
        trial = optuna.Trial(self.study, self.asked[record.number])
        values = [float(record.measures.get(name, math.nan)) for name in self.objectives]
        if record.status == "failed" or not all(map(math.isfinite, values)):
            reason = record.reason or "an objective is missing or not finite"
            trial.set_user_attr("failure", reason)
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for constraint in self.constraints:
            violation = constraint.violation(record.measures)
            trial.set_constraint(constraint.name, violation)
        if record.last:
            missed = self.outside_region(record.last.epoch, record.measures)
            trial.set_constraint("tolerance", missed)
        self.study.tell(trial, values)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's own storage holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study's own storage holds the state."""


_BEGUN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


def reconcile(
    study: optuna.Study, distributions: dict[str, BaseDistribution], ledger: Ledger
) -> tuple[list[Unfinished], list[TrialRecord]]:
    """What earlier sessions left open: trials to continue, the dense reference first, and ended
    ones that the study missed.

    A trial that the study gave out, and whose process died before the journal heard of it, begins
    anew with its values.

    Raises:
        UserError: if one of the two is older than the other: the study lacks a trial that the
            journal has, or knows how a trial ended and the journal does not.
    """
    known = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    _refuse_one_that_is_older(study.study_name, known, ledger)
    unfinished = []
    untold = []
    if ledger.dense is None:
        unfinished.append(Unfinished(None, {}))
    elif ledger.dense.unfinished:
        unfinished.append(continued(ledger.dense))
    for number, frozen in sorted(known.items()):
        if frozen.state is not TrialState.RUNNING:
            continue
        heard = ledger.by_label.get(label(number))
        if heard is None:
            trial = optuna.Trial(study, optuna_internals.trial_id(frozen))
            values = {}
            for path, distribution in distributions.items():
                values[path] = _suggested(trial, path, distribution)
            unfinished.append(Unfinished(number, values))
        elif heard.unfinished:
            unfinished.append(continued(heard))
        else:
            untold.append(heard)
    return unfinished, untold


def _refuse_one_that_is_older(name: str, known: dict[int, FrozenTrial], ledger: Ledger) -> None:
    """Raises UserError as `reconcile`; `known` are the trials of the study `name` by number."""
    lost = [record.label for record in ledger.trials if record.number not in known]
    if lost:
        raise UserError(
            f"Optuna's study '{name}' has no {_listed(lost)}, which the journal has; restore the "
            f"study, or make it anew from the journal: slimfront rebuild {name}"
        )
    # The journal is written first.
    vanished = []
    for number, trial in known.items():
        heard = ledger.by_label.get(label(number))
        if trial.state.is_finished() and (heard is None or heard.unfinished):
            vanished.append(label(number))
    if vanished:
        raise UserError(
            f"the journal of {name} is older than Optuna's study, which knows how "
            f"{_listed(vanished)} ended; restore the newer journal, or give these up and make the "
            f"study anew from this one: slimfront rebuild {name}"
        )


def _listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    first = ", ".join(names[:3])
    if len(names) > 3:
        return f"{first} and {len(names) - 3} more"
    return first


def continued(record: TrialRecord) -> Unfinished:
    """The trial from its last checkpoint on."""
    checkpoint = None
    if record.resumable:
        checkpoint = record.resumable.checkpoint
    return Unfinished(record.number, record.values, checkpoint)


def _suggested(trial: optuna.Trial, path: str, distribution: BaseDistribution) -> Any:
    """The trial's value for a path: the one that it has, or one drawn now if its process died
    before it was."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(path, distribution.choices)
    if isinstance(distribution, FloatDistribution):
        suggest: Callable[..., Any] = trial.suggest_float
    else:
        assert isinstance(distribution, IntDistribution)
        suggest = trial.suggest_int
    return suggest(
        path,
        distribution.low,
        distribution.high,
        log=distribution.log,
        step=distribution.step,
    )
