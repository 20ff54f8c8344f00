"""Multi-objective successive halving for Ray Tune. It stands alone: copy or import it for any
trainable that reports numbers.

Schmucker et al. 2021, Multi-objective asynchronous successive halving, arXiv 2106.12639: at each
rung a trial is ranked, among all that have reached that rung so far, by non-dominated sorting; ties
within a front are broken by an ε-net, which prefers points far from those already chosen; the trial
goes on if it is among the top 1/η. Decisions are taken as trials arrive, so none waits for another.

    from slimfront.search.engine.scheduler import MultiObjectiveASHA

    scheduler = MultiObjectiveASHA({"quality": "max", "parameters": "min"}, time_attr="epoch",
    grace=1, reduction=3) tune.Tuner(trainable, tune_config=tune.TuneConfig(scheduler=scheduler,
    num_samples=100))

Leave `metric` and `mode` of `TuneConfig` out: the objectives are named here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import moocore
import numpy as np
from numpy.typing import NDArray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

Floats = NDArray[np.float64]
Losses = Floats
"""(N, M): N trials with M objectives, all minimised."""
TieBreak = Literal["epsilon_net", "crowding"]


def epsilon_net_order(losses: Losses) -> list[int]:
    """An order of points in which each is as far as can be from all before it.

    The first is the best in the first objective. Distances are Euclidean, with each objective
    scaled to [0, 1]; of equal distances the earlier point comes first.
    """
    scaled = _scaled(losses)
    of_first_objective = losses[:, 0]
    first = int(of_first_objective.argmin())
    order = [first]
    nearest = _distances(scaled, first)
    nearest[order] = -1.0
    count = len(losses)
    while len(order) < count:
        rounded = nearest.round(9)  # what is equal but for rounding is equal
        chosen = int(rounded.argmax())
        order.append(chosen)
        distances = _distances(scaled, chosen)
        nearest = np.minimum(nearest, distances)
        nearest[order] = -1.0
    return order


def _scaled(losses: Losses) -> Losses:
    """Each objective from 0 to 1 over the points."""
    low = losses.min(axis=0)
    high = losses.max(axis=0)
    varies = high > low
    span = high - low
    divisor = np.where(varies, span, 1.0)
    scaled: Losses = (losses - low) / divisor
    return scaled


def _distances(points: Losses, index: int) -> Floats:
    """Of all points (N, M) to one of them, (N,)."""
    one = points[index]
    differences = points - one
    distances: Floats = np.linalg.norm(differences, axis=1)
    return distances


def crowding_order(losses: Losses) -> list[int]:
    """An order of points by falling crowding distance (Deb et al. 2002, NSGA-II, section III.B):
    the least crowded first."""
    count = len(losses)
    distance = np.zeros(count)
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        least = ordered[0]
        largest = ordered[-1]
        span = largest - least
        ends = order[[0, -1]]
        distance[ends] = np.inf
        if span > 0:
            inner = order[1:-1]
            after = ordered[2:]
            before = ordered[:-2]
            between = after - before
            distance[inner] += between / span
    by_distance = np.argsort(-distance, kind="stable")
    least_crowded: list[int] = by_distance.tolist()
    return least_crowded


_TIE_BREAKS: dict[str, Callable[[Losses], list[int]]] = {
    "epsilon_net": epsilon_net_order,
    "crowding": crowding_order,
}


def ranking(
    losses: Losses, tie_break: TieBreak = "epsilon_net", violations: Losses | None = None
) -> list[int]:
    """The indices of points from best to worst: front by front, within a front by the tie-break.

    Those with a violation (N,) above 0 come behind all others, the least first (constraint
    domination: Deb et al. 2002, NSGA-II, section VI.A); points with NaN come last.
    """
    finite = np.isfinite(losses).all(axis=1)
    if violations is None:
        count = len(losses)
        violations = np.zeros(count)
    violates = violations > 0
    usable = np.flatnonzero(finite & ~violates)
    outside = np.flatnonzero(finite & violates)
    without_losses = np.flatnonzero(~finite)
    order: list[int] = []
    if len(usable):
        within = _front_by_front(losses[usable], tie_break)
        order += usable[within].tolist()
    missed = violations[outside]
    by_violation = np.argsort(missed, kind="stable")
    order += outside[by_violation].tolist()
    order += without_losses.tolist()
    return order


def _front_by_front(losses: Losses, tie_break: TieBreak) -> list[int]:
    """The order of points that are all finite, and all as they should be."""
    order_within = _TIE_BREAKS[tie_break]
    ranks = moocore.pareto_rank(losses)
    last = int(ranks.max())
    order: list[int] = []
    for rank in range(last + 1):
        has_rank = ranks == rank
        front = np.flatnonzero(has_rank)
        within = order_within(losses[front])
        order += front[within].tolist()
    return order


def goes_on(
    others: Losses,
    mine: Losses,
    reduction: float,
    tie_break: TieBreak = "epsilon_net",
    violations: Losses | None = None,
) -> bool:
    """Whether a trial with losses `mine` (M,) is among the top 1/η of a rung that `others` (N, M)
    reached before it.

    That is, fewer than ⌈N / η⌉ of the N others rank before it; the first of a rung always goes on.
    A trial with NaN does not. `violations` (1 + N,) are mine and theirs (see `ranking`).
    """
    if not np.isfinite(mine).all():
        return False
    if not len(others):
        return True
    together = np.vstack([mine[None], others])
    order = ranking(together, tie_break, violations)
    position = order.index(0)
    best = math.ceil(len(others) / reduction)
    return position < best


class MultiObjectiveASHA(FIFOScheduler):
    """Asynchronous successive halving on several objectives.

    Args:
        objectives: what results are judged by, `{"quality": "max", "parameters": "min"}`; all of
            it must be in a result when a rung is reached.
        time_attr: what counts time in a result, rising.
        grace: the time of the first rung: no trial is stopped before.
        reduction: η; the top 1/η of a rung go on, and the next rung is at η times its time.
        max_time: no rung is at this time or later (a trial ends by itself then).
        brackets: trials are dealt out in turn to so many brackets; bracket s has its first rung at
            grace · ηˢ.
        tie_break: `epsilon_net` or `crowding`.
        record: called with what must be remembered for a restart, plain data that JSON can hold:
            Ray never saves a scheduler's state itself.
        earlier: what `record` was called with before the restart, in order.
        key: what a trial is called there, the same after a restart; Ray's trial id if left out.
        exempt: trials that are neither judged nor counted, such as a reference.
        violation: by how much a result misses what is wanted of it; what misses it ranks behind
            what does not.
    """

    def __init__(
        self,
        objectives: Mapping[str, Literal["min", "max"]],
        *,
        time_attr: str = "training_iteration",
        grace: float = 1,
        reduction: float = 3,
        max_time: float = math.inf,
        brackets: int = 1,
        tie_break: TieBreak = "epsilon_net",
        record: Callable[[dict[str, Any]], object] = lambda _entry: None,
        earlier: Iterable[dict[str, Any]] = (),
        key: Callable[[Trial], str] | None = None,
        exempt: Callable[[Trial], bool] = lambda _trial: False,
        violation: Callable[[Mapping[str, Any]], float] = lambda _result: 0.0,
    ) -> None:
        super().__init__()
        modes = set(objectives.values())
        if not objectives or not modes <= {"min", "max"}:
            raise ValueError(
                f"objectives map names to 'min' or 'max', and they are {dict(objectives)}"
            )
        in_range = grace > 0 and reduction > 1 and brackets >= 1
        if not in_range or tie_break not in _TIE_BREAKS:
            raise ValueError(
                "grace must be above 0, reduction above 1, brackets at least 1, tie_break "
                "epsilon_net or crowding"
            )
        self.objectives = dict(objectives)
        self.time_attr = time_attr
        self.reduction = reduction
        self.tie_break: TieBreak = tie_break
        self.key = key or (lambda trial: str(trial.trial_id))
        self.exempt = exempt
        self.violation = violation
        self.levels = []
        for bracket in range(brackets):
            first = grace * reduction**bracket
            self.levels.append(rung_times(first, reduction, max_time))
        self.brackets: dict[str, int] = {}
        self.rungs: dict[tuple[int, int], dict[str, Losses]] = {}
        self.violations: dict[tuple[int, int], dict[str, float]] = {}
        self.record = record
        for entry in earlier:
            self._restore(entry)

    def _restore(self, entry: dict[str, Any]) -> None:
        trial = entry["trial"]
        bracket = entry["bracket"]
        self.brackets[trial] = bracket
        if "rung" not in entry:
            return
        number = entry["rung"]
        place = (bracket, number)
        losses = np.array(entry["losses"], dtype=np.float64)  # None, as JSON has it, becomes NaN
        rung = self.rungs.setdefault(place, {})
        rung[trial] = losses
        missed = self.violations.setdefault(place, {})
        missed[trial] = entry.get("violation", 0.0)

    def _record(self, entry: dict[str, Any]) -> None:
        self._restore(entry)
        self.record(entry)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Deals the trial out to a bracket; one that comes back after a restart keeps its own."""
        super().on_trial_add(tune_controller, trial)
        name = self.key(trial)
        if self.exempt(trial) or name in self.brackets:
            return
        before = len(self.brackets)
        bracket = before % len(self.levels)
        self._record({"trial": name, "bracket": bracket})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:  # noqa: ARG002
        """CONTINUE or STOP; a trial is judged once at each rung, at the first result at or after
        its time."""
        decision: str = TrialScheduler.CONTINUE
        if self.exempt(trial) or self.time_attr not in result:
            return decision
        name = self.key(trial)
        bracket = self.brackets[name]
        now = result[self.time_attr]
        times = self.levels[bracket]
        for rung, time in enumerate(times):
            place = (bracket, rung)
            others = self.rungs.get(place, {})
            if now < time or name in others:
                continue
            mine = self.losses(result)
            violation = self.violation(result)
            missed = self.violations.get(place, {})
            violations = [violation, *missed.values()]
            if not self._goes_on(others, mine, violations):
                decision = TrialScheduler.STOP
            entry: dict[str, Any] = {
                "trial": name,
                "bracket": bracket,
                "rung": rung,
                "losses": _for_json(mine),
            }
            if 0 < violation < math.inf:
                entry["violation"] = violation
            self._record(entry)
        return decision

    def _goes_on(self, others: Mapping[str, Losses], mine: Losses, violations: list[float]) -> bool:
        rows = list(others.values())
        before = np.array(rows)
        before = before.reshape(len(rows), len(self.objectives))
        return goes_on(
            others=before,
            mine=mine,
            reduction=self.reduction,
            tie_break=self.tie_break,
            violations=np.array(violations),
        )

    def losses(self, result: Mapping[str, Any]) -> Losses:
        """The objectives of a result, (M,), turned so that less is better; NaN for one that is
        missing."""
        found = []
        for name, mode in self.objectives.items():
            reported = result.get(name, math.nan)
            value = float(reported)
            if mode == "max":
                value = -value
            found.append(value)
        return np.array(found)

    def debug_string(self) -> str:
        """One line for Ray's status."""
        filled = {}
        for place in sorted(self.rungs):
            bracket, rung = place
            time = self.levels[bracket][rung]
            trials = self.rungs[place]
            filled[f"{bracket}/{time:g}"] = len(trials)
        return f"MultiObjectiveASHA, trials per bracket/rung: {filled}"


def _for_json(losses: Losses) -> list[float | None]:
    """None for what is not finite, which JSON has not."""
    found: list[float | None] = losses.tolist()
    for place, finite in enumerate(np.isfinite(losses)):
        if not finite:
            found[place] = None
    return found


def rung_times(grace: float, reduction: float, max_time: float, most: int = 30) -> list[float]:
    """grace, grace · η, grace · η², … below `max_time`; without one, `most` of them."""
    times = []
    for power in range(most):
        time = grace * reduction**power
        if time < max_time:
            times.append(time)
    return times
