"""Trainings of members of a front with other seeds: which are missing, and how they are made on
the cluster."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from slimfront.search.config.schema import Config
from slimfront.search.record.events import Event, NetworkReplicated
from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import MeasuredNetwork, label
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.training.finishing import ONE_SHOT_SHARE, Trained
from slimfront.trainables.training.own_loop import training_of

log = logging.getLogger(__name__)

_ASK_S = 1.0


@dataclass(frozen=True)
class Replica:
    """One training that is to be done: a trial's, with another seed, up to an epoch."""

    number: int | None
    epoch: int
    seed: int
    candidate: dict[str, Any]
    shares: dict[int, float]
    """By the step of one-shot pruning, 0 for none: the share of the weights that it keeps."""

    @property
    def key(self) -> tuple[int | None, int, int, tuple[int, ...]]:
        """Which training it is, and of which networks."""
        return self.number, self.epoch, self.seed, tuple(sorted(self.shares))


def planned(config: Config, ledger: Ledger, seeds: int) -> list[Replica]:
    """The trainings that are missing, those of the baseline first. Raises UserError as
    `replicate`."""
    front = ledger.front.members()
    members = shown(ledger, front).members
    if not members or ledger.dense_network is None:
        raise UserError(
            "the search has no front beside a trained baseline yet; resume it, and replicate its "
            "members then"
        )
    _refuse_what_needs_the_search(config, members)
    if config.baseline_is_trained:
        members = [ledger.dense_network, *members]
    by_training: dict[tuple[int | None, int], list[MeasuredNetwork]] = {}
    for member in members:
        training = (member.trial.number, member.epoch)
        by_training.setdefault(training, []).append(member)
    jobs = []
    for of_training in by_training.values():
        for index in range(seeds):
            seed = config.search.seed_of_replica(index)
            missing = [member for member in of_training if seed not in member.replicas]
            if missing:
                jobs.append(_replica(config, missing, seed))
    return jobs


def _replica(config: Config, missing: Sequence[MeasuredNetwork], seed: int) -> Replica:
    """The training that gives these networks of one trial and epoch for another seed."""
    first = missing[0]
    candidate = config.reference()
    if first.trial.number is not None:
        candidate = config.candidate(first.trial.values)
    training = candidate.training.model_copy(update={"seed": seed})
    candidate = candidate.model_copy(update={"training": training})
    return Replica(
        number=first.trial.number,
        epoch=first.epoch,
        seed=seed,
        candidate=candidate.model_dump(mode="json"),
        shares={member.step: _share(config, member) for member in missing},
    )


def _refuse_what_needs_the_search(config: Config, members: Sequence[MeasuredNetwork]) -> None:
    for member in members:
        candidate = config.candidate(member.trial.values)
        reason = config.why_not_replicated(candidate, pruned=member.step > 0)
        if reason is not None:
            raise UserError(f"{member.name} cannot be trained anew: {reason}")


def _share(config: Config, member: MeasuredNetwork) -> float:
    """The share of its origin's weights that a network has kept in one-shot pruning; in journals of
    older versions each step has kept the same."""
    each = config.candidate(member.trial.values).one_shot.keep
    return member.measures.get(ONE_SHOT_SHARE, each**member.step)


def train_missing(
    config: Config,
    ledger: Ledger,
    seeds: int,
    write: Callable[[Event], object],
    say: Callable[[str], object],
    ends: Callable[[], bool] = lambda: False,
) -> None:
    """Trains what is missing on the Ray that this process has joined, until each member of the
    region that matters has its means: those of the first may bring others into it.

    Args:
        seeds: so many trainings of each.
        write: takes what was measured, and has the ledger know it.
        say: called with a line about each training that has ended.
        ends: asked about once a second: whether to leave off.

    Raises:
        UserError: if members cannot be trained apart from the search, or none of the trainings
            succeeds.
    """
    tried: set[tuple[int | None, int, int, tuple[int, ...]]] = set()
    while not ends():
        jobs = [job for job in planned(config, ledger, seeds) if job.key not in tried]
        if not jobs:
            return
        tried.update(job.key for job in jobs)
        _train(config, jobs, write, say, ends)


def _train(
    config: Config,
    jobs: Sequence[Replica],
    write: Callable[[Event], object],
    say: Callable[[str], object],
    ends: Callable[[], bool],
) -> None:
    resources = config.resources
    options = ray.remote(
        num_cpus=resources.cpu,
        num_gpus=resources.gpu,
        max_retries=config.search.retries,
    )
    train = options(train_again)
    running = {}
    for job in jobs:
        reference = train.remote(job.candidate, job.epoch, job.shares)
        running[reference] = job
    failures = 0
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=_ASK_S)
        if ends():
            for left in running:
                ray.cancel(left, force=True)
            return
        for reference in done:
            job = running.pop(reference)
            reason = _taken(reference, job, write)
            if reason is not None:
                failures += 1
            if failures == len(jobs):
                raise UserError(f"none of {failures} trainings succeeded: {reason}")
            say(f"{len(jobs) - len(running)} of {len(jobs)} trainings")


def _taken(reference: Any, job: Replica, write: Callable[[Event], object]) -> str | None:
    """Writes what a training that has ended measured; why it failed, if it did."""
    try:
        found = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = first_line(getattr(error, "cause", error))
        log.warning(
            "%s with seed %d failed, and is missing: %s", label(job.number), job.seed, reason
        )
        return reason
    for step, measures in found.items():
        event = NetworkReplicated(
            number=job.number,
            epoch=job.epoch,
            step=step,
            seed=job.seed,
            measures=measures,
        )
        write(event)
    return None


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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    candidate = Candidate.model_validate(plain)
    training = training_of(candidate, device)
    try:
        while not training.done and training.epoch < epoch:
            training.run_epoch()
        trained = training.finish(one_shot=False)
        networks: dict[int, Trained] = {}
        for step, share in shares.items():
            networks[step] = trained
            if step:
                networks[step] = training.finishing.pruned_to(trained, share)
    finally:
        training.close()
    return {step: _measured(made, training.data) for step, made in networks.items()}


def _measured(made: Trained, data: Dataset) -> dict[str, float]:
    """What is measured of a network, and its metrics on the test split."""
    network = made.compacted.network
    tested = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
    found = made.measures | tested
    return {name: float(value) for name, value in found.items()}
