"""Ray Tune's controller, but for one decision: a trial whose own process is starting waits for it;
with `TrialActors`; and without memory of trials that have ended well, of which the journal has all.

Ray Tune hands such a trial the first process that another trial leaves, and stops the one that
starts. Where trials are shorter than the start of a process (imports on a busy node), no process
would ever come to train: the search stays on its first node.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from slimfront.search.engine.ray_internals.slots import SlotManager
from slimfront.search.engine.ray_internals.trial_actors import TrialActors


@contextmanager
def starts_are_awaited() -> Iterator[None]:
    """Within, searches wait for processes that start, while more trials are to come for those that
    are free."""
    before = tune.TuneController
    tune.TuneController = Controller
    try:
        yield
    finally:
        tune.TuneController = before


class Controller(TuneController):
    """Ray Tune's, but for those."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._class_cache = TrialActors()

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        if (
            trial not in self._resetting_trials
            and self._starts(trial)
            and self._search_alg.searcher.to_come
        ):
            return False
        given: bool = super()._maybe_reuse_cached_actor(trial)
        return given

    def step(self) -> None:
        """As Ray Tune's; whoever was to hear of trials that end in it has heard of them then."""
        super().step()
        for trial in list(self._stopped_trials):
            has_process = trial in self._trial_to_actor
            if not has_process and not trial.is_saving:
                self._forget(trial)

    def _forget(self, trial: Trial) -> None:
        """Lets go of a trial with its reports, of which Ray Tune would keep a hundred kilobytes."""
        self._stopped_trials.discard(trial)
        self._trials_to_cache.discard(trial)
        self._trials.remove(trial)

    def _starts(self, trial: Trial) -> bool:
        """Whether a process with the resources of the trial is on its way to it."""
        actor = self._trial_to_actor.get(trial)
        if actor is None or actor in self._started_actors:
            return False
        manager = self._actor_manager
        if isinstance(manager, SlotManager):
            return manager.is_starting(actor)
        return actor in manager._live_actors_to_ray_actors_resources
