"""Members of a front trained anew with other seeds: how good they are by their means, and how far
that spreads."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from slimfront.search.config.schema import Config
from slimfront.search.engine.nodes import check_fits, ray_session
from slimfront.search.engine.runner import session_recorder
from slimfront.search.record.events import NetworkReplicated, SessionBegan, SessionEnded
from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.session import Session, open_existing
from slimfront.search.record.trials import MeasuredNetwork, label
from slimfront.search.tracking import Recorder, connect, taking_writes
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.models import built
from slimfront.trainables.training.finishing import ONE_SHOT_SHARE, Trained
from slimfront.trainables.training.own_loop import training_of
from slimfront.trainables.training.refit import Refit

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_FIRST_SEED = 2**40
"""Far from those of trials."""


@dataclass(frozen=True)
class Replica:
    """One training that is to be done: a trial's, with another seed, up to an epoch."""

    number: int | None
    epoch: int
    seed: int
    candidate: dict[str, Any]
    shares: dict[int, float]
    """By the step of one-shot pruning, 0 for none: the share of the weights that it keeps."""


def replicate(
    search: str,
    seeds: int = 5,
    storage_path: str = "runs",
    address: str | None = None,
    say: Callable[[str], object] = lambda _text: None,
) -> SearchResult:
    """Trains the baseline and the members of the front in the region that matters anew, each with
    `seeds` other seeds; those that are there already are not trained again.

    Args:
        say: called with a line about each training that has ended.

    Returns:
        The search with its replicas; what is recommended is judged by their means.

    Raises:
        UserError: if there is no such search, it is running or has not ended, it has no front, its
            members cannot be trained apart from it, its network cannot be built here, none of the
            trainings succeeds, or its journal takes no more.
    """
    session = open_existing(search, storage_path)
    try:
        ended = _last_end(session)
        jobs = planned(session.config, session.ledger, seeds)
        # What this machine cannot build, no worker can.
        built(session.config.model, load_once(session.config.data, _CPU, session.config.task))
        with ray_session(address), _recorded(session, ended) as recorder:
            check_fits(session.config)
            _train_all(session, recorder, jobs, say)
    except OSError as error:
        raise UserError(
            f"the journal of {search} took no more: {error.strerror}; what is in it stays, and is "
            "not trained again: make room, and call replicate once more"
        ) from None
    finally:
        session.journal.close()
    return SearchResult(
        search=session.directory.name,
        ledger=session.ledger,
        front=session.ledger.front.members(),
        wall_seconds=session.seconds_before(),
        tracking_uri=session.config.tracking.shown_uri(),
        interrupted=False,
        run_ids=dict(recorder.run_ids),
        undelivered=not recorder.complete,
    )


def planned(config: Config, ledger: Ledger, seeds: int) -> list[Replica]:
    """The trainings that are missing, those of the baseline first. Raises UserError as
    `replicate`."""
    members = shown(ledger, ledger.front.members()).members
    if not members or ledger.dense_network is None:
        raise UserError(
            "the search has no front beside a trained baseline yet; resume it, and replicate its "
            "members then"
        )
    _refuse_what_needs_the_search(config, members)
    by_training: dict[tuple[int | None, int], list[MeasuredNetwork]] = {}
    if config.baseline_is_trained:
        members = [ledger.dense_network, *members]
    for member in members:
        by_training.setdefault((member.trial.number, member.epoch), []).append(member)
    jobs = []
    for (number, epoch), of_training in by_training.items():
        candidate = config.reference()
        if number is not None:
            candidate = config.candidate(of_training[0].trial.values)
        for index in range(seeds):
            seed = _FIRST_SEED + index
            missing = [member for member in of_training if seed not in member.replicas]
            if not missing:
                continue
            shares = {member.step: _share(config, member) for member in missing}
            training = candidate.training.model_copy(update={"seed": seed})
            plain = candidate.model_copy(update={"training": training}).model_dump(mode="json")
            jobs.append(Replica(number, epoch, seed, plain, shares))
    return jobs


def _refuse_what_needs_the_search(config: Config, members: Sequence[MeasuredNetwork]) -> None:
    for member in members:
        candidate = config.candidate(member.trial.values)
        if candidate.distill is not None and config.teaches_by_baseline(candidate.distill):
            raise UserError(
                f"{member.name} was taught by the baseline of this search, and cannot be trained "
                "apart from it; give distill.teacher a file"
            )
        if member.step and candidate.one_shot.recover:
            raise UserError(
                f"{member.name} was trained further after one-shot pruning (one_shot.recover), "
                "which is not replicated"
            )
        if candidate.int8:
            raise UserError(f"{member.name} is an int8 network, which is not replicated")


def _share(config: Config, member: MeasuredNetwork) -> float:
    """The share of its origin's weights that a network has kept in one-shot pruning; in journals of
    older versions each step has kept the same."""
    each = config.candidate(member.trial.values).one_shot.keep
    return member.measures.get(ONE_SHOT_SHARE, each**member.step)


def _last_end(session: Session) -> SessionEnded:
    for event in reversed(session.earlier):
        if isinstance(event, SessionEnded):
            return event
    name = session.directory.name
    raise UserError(f"{name} has not ended; let it end first: slimfront resume {name}")


@contextlib.contextmanager
def _recorded(session: Session, ended: SessionEnded) -> Iterator[Recorder]:
    """A session of the journal and of MLflow around the block."""
    config = session.config
    uri = config.tracking.absolute_uri()
    client = connect(uri, writes=True)
    with taking_writes(uri, f"slimfront sync {session.folder.search}"):
        recorder = session_recorder(session, client)
    recorder.take(session.journal.append(SessionBegan(session=session.number)))
    try:
        yield recorder
    finally:
        again = SessionEnded(status=ended.status, seconds=ended.seconds)
        recorder.take(session.journal.append(again))
        recorder.close()


def _train_all(
    session: Session, recorder: Recorder, jobs: Sequence[Replica], say: Callable[[str], object]
) -> None:
    resources = session.config.resources
    remote = ray.remote(
        num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=session.config.search.retries
    )(train_again)
    failures = 0
    running = {remote.remote(job.candidate, job.epoch, job.shares): job for job in jobs}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done)
        try:
            found = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = first_line(getattr(error, "cause", error))
            name = label(job.number)
            log.warning("%s with seed %d failed, and is missing: %s", name, job.seed, reason)
            failures += 1
            if failures == len(jobs):
                raise UserError(f"none of {failures} trainings succeeded: {reason}") from None
            continue
        for step, measures in found.items():
            event = session.journal.append(
                NetworkReplicated(
                    number=job.number,
                    epoch=job.epoch,
                    step=step,
                    seed=job.seed,
                    measures=measures,
                )
            )
            session.ledger.apply(event)
            recorder.take(event)
        say(f"{len(jobs) - len(running)} of {len(jobs)} trainings")


def train_again(
    plain: dict[str, Any], epoch: int, shares: dict[int, float]
) -> dict[int, dict[str, float]]:
    """Trains a candidate up to an epoch, in this process, and measures it, and pruned in one shot
    to each share of its weights, as it would ship.

    Returns:
        By the step of one-shot pruning: the measures, and the metrics on both splits, however bad
        they are: without the bad ones the means would flatter.

    Raises:
        TrialFailure: if the loss diverges, or a network cannot be compacted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = training_of(Candidate.model_validate(plain), device)
    data = training.data
    try:
        while not training.done and training.epoch < epoch:
            training.run_epoch()
        trained = training.finish(None if training.done else Refit(), one_shot=False)
        networks: dict[int, Trained] = {}
        for step, share in shares.items():
            networks[step] = training.finishing.pruned_to(trained, share) if step else trained
    finally:
        training.close()
    found = {}
    for step, made in networks.items():
        network = made.compacted.network
        tested = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
        found[step] = {name: float(value) for name, value in {**made.measures, **tested}.items()}
    return found
