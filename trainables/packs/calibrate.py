"""How many candidates to train in one pack: measured, on a few steps."""

import math
from collections.abc import Iterator
from contextlib import suppress

import torch

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Split
from slimfront.trainables.inputs import repeated
from slimfront.trainables.measures.latency import seconds_of, threads_set
from slimfront.trainables.packs.packable import packable_training
from slimfront.trainables.packs.plan import Plan
from slimfront.trainables.packs.stack import Stack
from slimfront.trainables.packs.step import step_of
from slimfront.trainables.packs.streams import can_stream
from slimfront.trainables.training.loop import Training

_LONG_S = 0.1
"""Of steps that take longer alone so much is arithmetic that they are not tried in packs."""

_GAIN = 1.1
"""The smallest pack is taken of those that take at most so many times as long as the fastest."""

_RECORDED = 20
"""After so many steps those of most trainings are recorded, where they can be."""

_ROUNDS = 5
"""So often each size is measured, in turn, and the fastest of its rounds counts: what else a
machine does only adds time."""


def best_size(
    candidate: Candidate, most: int, device: torch.device | str = "cpu", threads: int = 1
) -> int:
    """The size of pack (1, 2, 4, … up to `most`) that trains candidates like this one fastest; 1 if
    it does not pack.

    Args:
        candidate: whose architecture, data, batch size and penalties count.
        most: members at most.
        device: that they are to train on.
        threads: of a trial, where that is the CPU.
    """
    first = Training(candidate, device)
    if packable_training(first) is not None:
        return 1
    batch = _first_batch(first)
    with threads_set(threads):
        if _alone(first, batch) > _LONG_S:
            return 1
        members = [first]
        sizes = [1]
        with suppress(torch.OutOfMemoryError):  # larger packs have no room
            while 2 * len(members) <= most:  # a pack of two may gain nothing where larger ones do
                as_many = range(len(members))
                members += [Training(candidate, device) for _ in as_many]
                _packed(members, batch)
                sizes.append(len(members))
        seconds = dict.fromkeys(sizes, math.inf)
        """Of a step, for each member, by the size of the pack."""
        for _ in range(_ROUNDS):
            for size in sizes:
                taken = _seconds_of_one(members[:size], batch)
                seconds[size] = min(seconds[size], taken)
    fastest = min(seconds.values())
    enough = _GAIN * fastest
    return next(size for size in sizes if seconds[size] <= enough)


def _first_batch(training: Training) -> Split:
    train = training.taught.train
    size = training.options.batch_size
    inputs = train.inputs[:size]
    targets = train.targets[:size]
    return Split(inputs, targets)


def _seconds_of_one(members: list[Training], batch: Split) -> float:
    """Seconds of a step for each of the members."""
    count = len(members)
    if count == 1:
        return _alone(members[0], batch)
    return _packed(members, batch) / count


def _alone(training: Training, batch: Split) -> float:
    if can_stream([training]):
        return _streamed([training])
    training.model.train()
    training.losses = training.losses or training.shared_losses()

    def take() -> None:
        training.step = 1
        training.train_batch(batch, 1.0)

    return seconds_of(take, training.device)


def _packed(members: list[Training], batch: Split) -> float:
    if can_stream(members):
        return _streamed(members)
    first = members[0]
    prepare = first.data.prepare
    count = len(members)
    sample = batch.inputs[:8]
    step = step_of(first, prepare(sample))
    stack = Stack(members)
    plan = Plan(members, step, 1, stack.weights)
    prepared = prepare(batch.inputs)
    inputs = repeated(prepared, count)
    wanted = batch.targets.to(first.device)
    targets = repeated(wanted, count)

    def take() -> None:
        for member in members:
            member.step = 1
        stack.train_step(step, inputs, targets, plan, 0)

    seconds = seconds_of(take, first.device)
    for row in range(count):
        stack.release(row)
    return seconds


def _streamed(members: list[Training]) -> float:
    """Seconds of a step of all members, each on a stream of its own, once all steps are
    recorded."""
    steps = [_endless(member) for member in members]

    def take() -> None:
        for step in steps:
            next(step)

    for _ in range(_RECORDED):
        take()
    return seconds_of(take, members[0].device)


def _endless(member: Training) -> Iterator[None]:
    """Steps of one epoch after the other."""
    while True:
        yield from member.steps()
