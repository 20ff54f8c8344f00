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
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from slimfront.search.config.objectives import Constraint
from slimfront.search.engine.driver_only import DriverOnly
from slimfront.search.engine.proposals import Proposals
from slimfront.search.record import optuna_internals
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import TrialRecord, label
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

    Values that an earlier trial was given are not trained again: `on_repeat(number, values, first)`
    is called, and says whether that was recorded; the study is told what it is told of the first,
    and the next trial is asked for.

    Args:
        trials: in all, those of earlier sessions too; repeated proposals do not count.
        earlier: what is known of earlier sessions.
        on_exhausted: called with a sentence when there are no more values to try.
        enough: asked before each new trial: why to ask for no more; None to go on.
        outside_region: by how much a network of that epoch, with these measures, misses the region
            that matters (see `Region.missed_by`): samplers prefer what does not.
        capacity: asked likewise: how many trials may be under way.
    """

    def __init__(
        self,
        study: optuna.Study,
        proposals: Proposals,
        objectives: Sequence[str],
        make_config: Callable[[Unfinished], dict[str, Any]],
        trials: int,
        *,
        constraints: Sequence[Constraint] = (),
        outside_region: Callable[[int, Mapping[str, Any]], float] = lambda _epoch, _measures: 0.0,
        unfinished: Sequence[Unfinished] = (Unfinished(None, {}),),
        earlier: Ledger | None = None,
        on_invalid: Callable[[int, dict[str, Any], str], None] | None = None,
        on_repeat: Callable[[int, dict[str, Any], int], bool] = lambda *_: True,
        on_exhausted: Callable[[str], None] = lambda _: None,
        enough: Callable[[], str | None] = lambda: None,
        capacity: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        super().__init__()
        self.study = study
        self.proposals = proposals
        self.objectives = list(objectives)
        self.make_config = make_config
        self.constraints = constraints
        self.outside_region = outside_region
        self.unfinished = list(unfinished)
        self.on_invalid = on_invalid
        self.on_repeat = on_repeat
        self.on_exhausted = on_exhausted
        self.enough = enough
        self.capacity = capacity
        self.asked = {
            trial.number: optuna_internals.trial_id(trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.state in _BEGUN
        }
        self.running: set[str] = set()
        self.ended: dict[int, TrialRecord] = {}
        self.repeats: dict[int, list[int]] = {}
        """By the number of the first: repeated proposals whose end is not known yet."""
        self.begun: set[int] = set()
        self.repeated = 0
        if earlier is not None:
            self._take_up(earlier)
        self.remaining = max(trials - (len(self.asked) - self.repeated), 0)

    def _take_up(self, earlier: Ledger) -> None:
        """Knows what earlier sessions trained, and tells what they left untold of repeats."""
        for record in earlier.trials:
            if record.number is None:
                continue
            self.begun.add(record.number)
            self.proposals.give(record.number, record.values)
            if not record.unfinished:
                self.ended[record.number] = record
        running = {
            trial.number
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        }
        for number, repeat in earlier.repeated.items():
            self.repeated += 1
            if number in running:
                self._as_first(number, repeat.first)

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
        while self.unfinished:
            left = self.unfinished.pop(0)
            if left.number is None or left.number in self.begun or self._is_new(left):
                return left
            self.remaining += 1
        in_a_row = 0
        while self.remaining:
            if why := self.enough():
                self._end(
                    f"{why}, so that the search ends with {self.remaining} of its trials left"
                )
            elif self.proposals.exhausted:
                self._end(
                    f"all {self.proposals.size} combinations of the space were tried, so that the "
                    f"search ends with {self.remaining} of its trials left; widen the space to "
                    "search on"
                )
            elif in_a_row == _MOST_REPEATS:
                self._end(
                    f"the last {in_a_row} proposals of the sampler all repeat earlier trials, so "
                    f"that the search ends with {self.remaining} of its trials left; widen the "
                    "space, or choose another sampler"
                )
            else:
                proposal = self._ask()
                if self._is_new(proposal):
                    self.remaining -= 1
                    return proposal
                in_a_row += 1
                self._help(in_a_row)
        return None

    def _end(self, why: str) -> None:
        """No more trials are asked for."""
        self.remaining = 0
        self.on_exhausted(why)

    def _ask(self) -> Unfinished:
        trial = self.study.ask()
        self.asked[trial.number] = optuna_internals.trial_id(trial)
        return Unfinished(trial.number, self.proposals.suggested(trial))

    def _is_new(self, proposal: Unfinished) -> bool:
        """Whether no earlier trial has these values; one that repeats them is told like that."""
        number = proposal.number
        assert number is not None
        first = self.proposals.give(number, proposal.values)
        if first == number:
            return True
        self.repeated += 1
        if self.on_repeat(number, proposal.values, first):
            self._as_first(number, first)
        return False

    def _help(self, in_a_row: int) -> None:
        """Has the study propose what was not tried yet, once the sampler keeps repeating itself."""
        if in_a_row % _OWN_TRIES == 0:
            untried = self.proposals.untried(seed=len(self.asked))
            if untried is not None:
                self.study.enqueue_trial(untried)

    def _as_first(self, number: int, first: int) -> None:
        """Tells that a proposal ended as the first of its values did, now or when that has."""
        if first in self.ended:
            self._tell(number, self.ended[first])
        else:
            self.repeats.setdefault(first, []).append(number)

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
        self.ended[record.number] = record
        for number in (record.number, *self.repeats.pop(record.number, ())):
            self._tell(number, record)

    def _tell(self, number: int, record: TrialRecord) -> None:
        """Tells of the trial `number` what the record says."""
        trial = optuna.Trial(self.study, self.asked[number])
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


_OWN_TRIES = 5
"""After so many repeats in a row the sampler is given values that were not tried, where they are
known."""

_MOST_REPEATS = 100
"""So many repeats in a row end a search: the sampler has nothing else to propose."""

_BEGUN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


def reconcile(
    study: optuna.Study, proposals: Proposals, ledger: Ledger
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
        if frozen.state is not TrialState.RUNNING or number in ledger.repeated:
            continue
        heard = ledger.by_label.get(label(number))
        if heard is None:
            trial = optuna.Trial(study, optuna_internals.trial_id(frozen))
            unfinished.append(Unfinished(number, proposals.suggested(trial)))
        elif heard.unfinished:
            unfinished.append(continued(heard))
        else:
            untold.append(heard)
    return unfinished, untold


def _refuse_one_that_is_older(name: str, known: dict[int, FrozenTrial], ledger: Ledger) -> None:
    """Raises UserError as `reconcile`; `known` are the trials of the study `name` by number."""
    numbers = [record.number for record in ledger.trials]
    lost = [label(number) for number in (*numbers, *ledger.repeated) if number not in known]
    if lost:
        raise UserError(
            f"Optuna's study '{name}' has no {_listed(lost)}, which the journal has; restore the "
            f"study, or make it anew from the journal: slimfront rebuild {name}"
        )
    # The journal is written first.
    vanished = []
    for number, trial in known.items():
        repeat = ledger.repeated.get(number)
        first = number if repeat is None else repeat.first
        heard = ledger.by_label.get(label(first))
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
