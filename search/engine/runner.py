"""Assembles the Ray Tune experiment of a config and runs it: trials, records, the front, and the
test set."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError
from ray import tune

from slimfront.search.config.objectives import Direction
from slimfront.search.config.schema import Config
from slimfront.search.engine.finished.finish import finish
from slimfront.search.engine.finished.unkept import cannot_be_kept, no_room_ends
from slimfront.search.engine.head import watched_head
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.engine.nodes import capacity, check_fits, ray_session
from slimfront.search.engine.observer import Observer
from slimfront.search.engine.packing import Packing, pack
from slimfront.search.engine.preflight import preflight
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.proposals import Proposals
from slimfront.search.engine.ray_internals.controller import starts_are_awaited
from slimfront.search.engine.ray_internals.quiet import NothingPrinted
from slimfront.search.engine.ray_internals.slots import shared_processes
from slimfront.search.engine.ray_internals.snapshots import without_snapshots
from slimfront.search.engine.room import (
    watched_room,
)
from slimfront.search.engine.scheduler import MultiObjectiveASHA
from slimfront.search.engine.searcher import InvalidCandidate, StudySearcher, Unfinished, reconcile
from slimfront.search.record.events import (
    RungReached,
    SessionBegan,
)
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.session import Session, begin, open_existing
from slimfront.search.record.starts import starting_values
from slimfront.search.record.study import open_study
from slimfront.search.record.trials import label
from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.registered import with_weights_in_files
from slimfront.search.tracking.store import Client, connect, taking_writes
from slimfront.trainables.errors import UserError
from slimfront.trainables.messages import TrialOrder
from slimfront.trainables.options import explain_first
from slimfront.trainables.trainable import CandidateTrainable

log = logging.getLogger(__name__)


def run_search(
    config: Config,
    progress: Progress | None = None,
    name: str | None = None,
    trainable: type[tune.Trainable] = CandidateTrainable,
    *,
    address: str | None = None,
    working_dir: str | None = None,
    interrupt: Interrupt | None = None,
) -> SearchResult:
    """Runs one search to its end, or until Ctrl-C.

    Args:
        name: of the search; made from the config's name and the time if left out.
        trainable: what trains a candidate.
        address: of a Ray cluster, and `working_dir`, what its nodes are sent: see
            `nodes.ray_session`.
        interrupt: what ends the search early, beside signals.

    Raises:
        UserError: before any trial starts, if the tracking store does not answer, its registry does
            not have the weights, the network does not fit the data, the resources of one trial are
            not there, or there is a search of that name.
    """
    config = with_weights_in_files(config)
    dense_sizes = preflight(config)
    starts = starting_values(config)
    client = connect(config.tracking.absolute_uri(), writes=True)
    with ray_session(address, working_dir):
        check_fits(config)
        session = begin(config, name, dense_sizes, starts)
        try:
            return _run(session, client, progress, trainable, interrupt)
        finally:
            session.journal.close()


def resume_search(
    search: str,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    storage_path: str = "runs",
    *,
    address: str | None = None,
    working_dir: str | None = None,
) -> SearchResult:
    """Continues a search that was cut off, or has ended and may now take longer.

    Finished trials stay as they are; others continue from their last checkpoint.

    Args:
        search: its name, in `storage_path`.
        overrides: `path=value`; only what `RESUMABLE` names may change.
        address: of a Ray cluster, and `working_dir`, what its nodes are sent: see
            `nodes.ray_session`.

    Raises:
        UserError: if there is no such search, its state cannot be read, it is running, or it is
            asked to change.
    """
    session = open_existing(search, storage_path, overrides)
    try:
        client = connect(session.config.tracking.absolute_uri(), writes=True)
        with ray_session(address, working_dir):
            check_fits(session.config)
            return _run(session, client, progress)
    finally:
        session.journal.close()


def _run(
    session: Session,
    client: Client,
    progress: Progress | None,
    trainable: type[tune.Trainable] = CandidateTrainable,
    interrupt: Interrupt | None = None,
) -> SearchResult:
    begun = time.monotonic()
    packing = (
        pack(session.config)
        if issubclass(trainable, CandidateTrainable)
        else Packing(1, capacity(session.config))
    )
    config = session.config
    ledger = session.ledger
    before = session.seconds_before()
    number = session.number
    ledger.planned = config.search.trials
    study = open_study(session)
    proposals = Proposals(config.search_space, config.distributions())
    unfinished, untold = reconcile(study, proposals, ledger)
    left = None
    if config.search.time is not None:
        left = max(float(config.search.time) - before, 0.0)
    interrupt = interrupt or Interrupt()
    interrupt.end_after(left)
    folder = session.folder
    with taking_writes(config.tracking.absolute_uri(), f"slimfront resume {folder.search}"):
        recorder = session_recorder(session, client)
    if config.tracking.system_metrics:
        recorder.watch_system()
    observer = Observer(
        journal=session.journal,
        ledger=ledger,
        recorder=recorder,
        interrupt=interrupt,
        progress=progress,
        retries=config.search.retries,
        relative=folder.relative,
    )
    searcher = StudySearcher(
        study=study,
        proposals=proposals,
        objectives=config.objectives,
        make_config=_config_maker(session, scheduler := _scheduler(session, observer)),
        trials=config.search.trials,
        constraints=config.chosen_constraints(),
        outside_region=ledger.region.missed_by,
        unfinished=unfinished,
        earlier=ledger,
        on_invalid=observer.reject,
        on_repeat=observer.repeat,
        on_exhausted=lambda why: log.warning("%s", why),
        enough=partial(_enough, ledger, config.search.patience),
        capacity=lambda: 1 if _waits_for_baseline(session.config, ledger) else packing.capacity(),
    )
    observer.tell = searcher.tell
    observer.again = searcher.again
    for record in untold:
        searcher.tell(record)
    # From here on trials may have finished: whatever happens, they are recorded and the front is
    # told.
    name = session.directory.name
    lost_head = (
        f"Ray's head node stopped while {name} ran; what was finished is safe: see that the "
        f"cluster runs again, where it is one, then `slimfront resume {name}`"
    )
    with (
        interrupt.on_signals(),
        _loaded_stays(),
        watched_head(interrupt, lost_head) as head,
        watched_room(observer.end),
    ):
        try:
            with no_room_ends(observer):
                observer.write(SessionBegan(session=number))
                if progress is not None:
                    progress.begun(folder.search, recorder.page_address)
                if searcher.to_come:
                    with (
                        shared_processes(packing.size, packing.processes),
                        starts_are_awaited(),
                        without_snapshots(),
                    ):
                        _run_trials(session, searcher, scheduler, observer, trainable)
        finally:
            result = finish(session, observer, recorder, before + time.monotonic() - begun)
    if head.lost.is_set():
        raise UserError(lost_head)
    if observer.failure is not None:
        raise cannot_be_kept(session, observer.failure) from None
    return result


def session_recorder(session: Session, client: Client) -> Recorder:
    """What delivers the journal of a session to MLflow, from where earlier ones stopped."""
    folder = session.folder
    fence = session.journal.fence
    return Recorder(
        client=client,
        config=session.config,
        search=folder.search,
        directory=folder.local,
        earlier=session.earlier,
        place=folder.place,
        may_write=fence.check if fence is not None else lambda: None,
    )


@contextmanager
def _loaded_stays() -> Iterator[None]:
    """Within, the collector of garbage leaves alone what is loaded: to go through it takes a third
    of a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _scheduler(session: Session, observer: Observer) -> MultiObjectiveASHA | None:
    stopping = session.config.search.early_stopping
    if stopping is None or session.config.training.epochs == 0:
        return None
    objectives: dict[str, Literal["min", "max"]] = {}
    for objective in session.config.chosen_objectives():
        objectives[objective.name] = "min"
        if objective.direction is Direction.MAXIMIZE:
            objectives[objective.name] = "max"
    ledger = session.ledger

    def outside_region(result: Mapping[str, Any]) -> float:
        return ledger.region.missed_by(int(result["epoch"]), result)

    return MultiObjectiveASHA(
        objectives,
        time_attr="epoch",
        grace=session.config.grace(),
        reduction=stopping.reduction,
        max_time=session.config.training.epochs,
        brackets=stopping.brackets,
        tie_break=stopping.tie_break,
        earlier=[event.entry for event in session.earlier if isinstance(event, RungReached)],
        record=lambda entry: observer.write(RungReached(entry=entry)),
        key=lambda trial: label(trial.config["number"]),
        exempt=lambda trial: trial.config["number"] is None,  # the dense reference
        violation=outside_region,
    )


def _config_maker(
    session: Session, scheduler: MultiObjectiveASHA | None
) -> Callable[[Unfinished], dict[str, Any]]:
    """Makes the Tune config of a trial. Without `training.seed`, trial n of search seed s trains
    with 1,000,003 s + n + 1."""
    config = session.config
    rungs: set[int] = set()
    if scheduler:
        for level in scheduler.levels:
            rungs.update(map(math.ceil, level))

    def make(trial: Unfinished) -> dict[str, Any]:
        number = trial.number
        try:
            candidate = config.reference() if number is None else config.candidate(trial.values)
        except (KeyError, ValidationError) as error:
            raise InvalidCandidate(
                f"these values make no candidate: {explain_first(error)}"
            ) from error
        teacher_from = None
        distill = candidate.distill
        teacher_model = None
        if number is not None and distill is not None and config.teaches_by_baseline(distill):
            teacher_from = _checkpoint_of_baseline(session.ledger)
            teacher_model = config.reference().model.model_dump(mode="json")
        place = 0
        front: list[dict[str, float]] = []
        report_at: tuple[int, ...] = ()
        if number is not None:
            place = number + 1
            report_at = tuple(sorted(rungs))
            front = session.ledger.front.told_to_trials()
        if candidate.training.seed is None:
            seed = config.search.seed_of_training(place)
            training = candidate.training.model_copy(update={"seed": seed})
            candidate = candidate.model_copy(update={"training": training})
        return TrialOrder(
            candidate=candidate.model_dump(mode="json"),
            resources=config.resources.for_ray(),
            number=number,
            values=trial.values,
            processes=config.resources.processes_of_a_trial(),
            report_at=report_at,
            resume_from=trial.checkpoint,
            teacher_from=teacher_from,
            teacher_model=teacher_model,
            front=front,
            session=f"{session.folder.search}-{session.number}",
        ).as_config()

    return make


def _enough(ledger: Ledger, patience: int | None) -> str | None:
    """Why a search has trained enough; None while it has not."""
    if patience is None or ledger.since_gain < patience:
        return None
    return f"the last {ledger.since_gain} trials gained nothing (search.patience: {patience})"


def _checkpoint_of_baseline(ledger: Ledger) -> str:
    """Where the network is that teaches all others; raises InvalidCandidate if there is none."""
    dense = ledger.dense_network
    ended = ledger.dense is not None and ledger.dense.status == "completed"
    if not ended or dense is None or dense.origin.checkpoint is None:
        raise InvalidCandidate(
            "the baseline, which was to be the teacher, ended without a network; give "
            "distill.teacher a network with weights"
        )
    return dense.origin.checkpoint


def _waits_for_baseline(config: Config, ledger: Ledger) -> bool:
    """Whether the baseline is the teacher of all others, and is not trained yet."""
    if not config.waits_for_baseline:
        return False
    return ledger.dense is None or ledger.dense.unfinished


def _run_trials(
    session: Session,
    searcher: StudySearcher,
    scheduler: MultiObjectiveASHA | None,
    observer: Observer,
    trainable: type[tune.Trainable],
) -> None:
    config = session.config
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when it is over
            reuse_actors=True,
            trial_dirname_creator=lambda trial: label(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name=f"session-{session.number}",  # Ray numbers checkpoints from 0 in each
            storage_path=session.folder.root,
            storage_filesystem=session.folder.bucket,
            callbacks=[observer, NothingPrinted()],
            stop=observer.interrupt,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=0, checkpoint_at_end=False
            ),  # the observer asks
            failure_config=tune.FailureConfig(max_failures=config.search.retries),
        ),
    )
    tuner.fit()


def sync_search(
    search: str,
    storage_path: str = "runs",
    tracking_uri: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[bool, list[str]]:
    """Delivers to MLflow what it did not take while the search ran.

    Returns:
        Whether all that MLflow takes is there now, and the names of what it refused for good.

    Raises:
        UserError: if there is no such search, it is running, or the store does not answer.
    """
    wanted = [*overrides, *([f"tracking.uri={tracking_uri}"] if tracking_uri else [])]
    session = open_existing(search, storage_path, wanted)
    try:
        uri = session.config.tracking.absolute_uri()
        folder = session.folder
        client = connect(uri, writes=True)
        with taking_writes(uri, f"slimfront sync {folder.search}"):
            recorder = session_recorder(session, client)
        return recorder.close(), recorder.refused
    finally:
        session.journal.close()
